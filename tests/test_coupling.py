"""Attentions that share a weight: cut alike, or each for itself, and never by another's plan."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import fxslim
from tests.models import WIDTH, Grouped, Residual, SideBySide, example
from tests.zoo.reference import call_of, compare, without_heads


def tiled_core(q, k, v):
    """Query head n attends to KV head n mod the number of these."""
    k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v)


def sharing(role, one, other):
    """Two layers of which the second has a weight of the first."""
    getattr(other, role).weight = getattr(one, role).weight
    return Residual(one=one, other=other)


@pytest.mark.parametrize(
    ("model", "units", "together"),
    [
        pytest.param(
            sharing("q", Grouped(4, 2, 2), Grouped(4, 2, 2)),
            (((0, 1), (2, 3)), ((0, 1), (2, 3))),
            True,
            id="the same groups",
        ),
        pytest.param(
            sharing("q", Grouped(4, 2, 2), Grouped(4, 2, 2, tiled_core)),
            (((0, 1), (2, 3)), ((0, 2), (1, 3))),
            False,
            id="groups across each other",
        ),
        pytest.param(
            sharing("q", Grouped(6, 3, 2), Grouped(6, 3, 2, tiled_core)),
            (((0, 1), (2, 3), (4, 5)), ((0, 3), (1, 4), (2, 5))),
            False,
            id="groups that overlap",
        ),
        pytest.param(
            sharing("q", Grouped(8, 8, 1), Grouped(8, 2, 1)),
            (((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 1, 2, 3), (4, 5, 6, 7))),
            True,
            id="heads of groups larger than there are groups",
        ),
        pytest.param(
            sharing("v", Grouped(4, 4, 2), Grouped(8, 4, 2)),
            (((0,), (1,), (2,), (3,)), ((0, 1), (2, 3), (4, 5), (6, 7))),
            True,
            id="units of one head and of two",
        ),
        pytest.param(
            sharing("v", Grouped(6, 2, 1), Grouped(6, 1, 2)),
            (((0, 1, 2), (3, 4, 5)), ((0,), (1,), (2,), (3,), (4,), (5,))),
            False,
            id="the heads of one are the channels of the other",
        ),
    ],
)
def test_what_one_attention_loses_another_keeps_unless_they_lose_it_together(
    model, units, together
):
    program = fxslim.capture(model, example())
    sites = fxslim.find_attention(program)
    assert tuple(site.unit for site in sites) == units
    assert [bool(site.coupled) for site in sites] == [together, together]
    lost = {site.name: list(range(site.num_heads)) for site in sites}
    plans = [{site.name: list(site.unit[1]) for site in sites}]
    if not together:
        plans += [lost | {site.name: list(site.unit[0])} for site in sites]
    for kept in plans:
        plan = fxslim.PruningPlan(kept, 0.5)
        slim = fxslim.narrow(program, plan)
        fxslim.verify(slim, fxslim.insert_head_masks(program), plan)
        call = call_of((example(2, 7),))
        reference = without_heads(model, sites, kept)
        assert compare(call.on(slim), call.on(reference)).relative < 1e-5


def test_layers_that_select_their_heads_say_what_is_whose():
    model = sharing("q", Grouped(6, 3, 2), Grouped(6, 3, 2, tiled_core))
    sites = fxslim.find_attention(fxslim.capture(model, example()))
    assert [(site.kind, site.num_kv_heads) for site in sites] == [("gqa", 3)] * 2
    for site, layer in zip(sites, ("layers.one", "layers.other"), strict=True):
        weights = [p.weight for p in (*site.query, *site.key, *site.value)]
        assert weights == ["layers.one.q.weight", f"{layer}.k.weight", f"{layer}.v.weight"]


def test_keys_and_values_go_where_query_heads_are_selected():
    model = sharing("q", Grouped(4, 2, 2), Grouped(4, 2, 2, tiled_core))
    slim = fxslim.compile(model, 0.5, example())
    assert slim.layers.one.q.weight.shape == (8, WIDTH)
    for layer in (slim.layers.one, slim.layers.other):
        assert layer.k.weight.shape == layer.v.weight.shape == (2, WIDTH)


@pytest.mark.parametrize("unit", ["group", "query", "any"])
def test_layers_with_units_of_other_sizes_are_planned_for_together(unit):
    """Where each is free to keep any head, both select their values, which stay whole."""
    model = sharing("v", Grouped(4, 4, 2), Grouped(8, 4, 2))
    slim = fxslim.compile(model, 0.5, example(), unit=unit)
    assert slim.layers.one.q.weight.shape == (4, WIDTH)
    assert slim.layers.one.v.weight.shape == (8 if unit == "any" else 4, WIDTH)


def test_a_plan_that_keeps_other_units_of_coupled_layers_is_refused():
    model = sharing("v", Grouped(4, 4, 2), Grouped(8, 4, 2))
    sites = fxslim.find_attention(fxslim.capture(model, example()))
    fxslim.PruningPlan.of({"layers.one": [1], "layers.other": [2, 3]}, sites)
    with pytest.raises(fxslim.PlanError, match="share weights, so they must keep the same heads"):
        fxslim.PruningPlan.of({"layers.one": [1], "layers.other": [4, 5]}, sites)


def test_contexts_side_by_side_do_not_couple():
    """What the one projection sums over of the other attention is not along this one's heads."""
    model = SideBySide(Grouped(4, 4, 2), Grouped(4, 2, 2))
    sites = fxslim.find_attention(fxslim.capture(model, example()))
    assert [(site.prunable, site.coupled) for site in sites] == [(True, ()), (True, ())]


@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_contexts_side_by_side_whose_heads_are_shared_are_one_attention(role):
    model = SideBySide(Grouped(4, 4, 2), Grouped(4, 4, 2))
    getattr(model.other, role).weight = getattr(model.one, role).weight
    (site,) = fxslim.find_attention(fxslim.capture(model, example()))
    assert site.output[0].index.tolist() == [
        [0, 1, 8, 9],
        [2, 3, 10, 11],
        [4, 5, 12, 13],
        [6, 7, 14, 15],
    ]
    assert fxslim.compile(model, 0.5, example()).out.weight.shape == (WIDTH, 8)


def test_contexts_that_are_added_before_one_projection_are_one_attention():
    """As where a second attention, to something else, is added to a model that is there."""

    class Added(SideBySide):
        def combined(self, one, other):
            return one + other

    model = Added(Grouped(4, 4, 2), Grouped(4, 2, 2))
    model.out = nn.Linear(8, WIDTH)
    (site,) = fxslim.find_attention(fxslim.capture(model, example()))
    assert (site.num_heads, site.unit) == (4, ((0, 1), (2, 3)))
    assert fxslim.compile(model, 0.5, example()).one.k.weight.shape == (4, WIDTH)


def test_heads_that_another_layer_sums_as_parts_of_its_own_are_refused():
    class Gating(nn.Module):
        """The second layer's two heads are gated by three of the first one's each."""

        def __init__(self):
            super().__init__()
            self.one, self.other = Grouped(6, 6, 2), Grouped(2, 2, 6)

        def forward(self, x):
            gate = self.one.context(x, self.one.q(x))
            x = x + self.one.o(gate)
            context = self.other.context(x, self.other.q(x))
            return x + self.other.o(context * gate.sigmoid())

    (site,) = fxslim.find_attention(fxslim.capture(Gating(), example()))
    assert site.reason == "one.o.weight does not have as many positions for every head"


@pytest.mark.parametrize("gated", [torch.sigmoid, torch.tanh])
def test_heads_that_gate_another_layers_go_with_them(gated):
    class Gating(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = Grouped(4, 4, 2), Grouped(4, 2, 2)

        def forward(self, x):
            gate = self.one.context(x, self.one.q(x))
            x = x + self.one.o(gate)
            return x + self.other.o(self.other.context(x, self.other.q(x)) * gated(gate))

    slim = fxslim.compile(Gating(), 0.5, example())
    assert slim.one.o.weight.shape == slim.other.o.weight.shape == (WIDTH, 4)


def test_single_heads_are_not_offered_where_sites_would_be_others():
    """What the queries have in common makes one site of two cores; selected keys part them."""

    class Asking(SideBySide):
        def queries(self, x):
            yield self.one, (q := self.one.q(x))
            yield self.other, self.other.q(x) + q

    model = Asking(Grouped(4, 4, 2), Grouped(4, 2, 2))
    model.other.q.weight = model.one.k.weight
    program = fxslim.capture(model, example())
    grouped, single = (fxslim.find_attention(program, unit=unit) for unit in ("group", "any"))
    assert [site.cores for site in grouped] == [site.cores for site in single]
    plan = fxslim.PruningPlan({single[0].name: [0]}, 0.75)
    slim = fxslim.narrow(program, plan)
    call = call_of((example(2, 7),))
    assert compare(call.on(slim), call.on(without_heads(model, single, plan.kept))).relative < 1e-5
