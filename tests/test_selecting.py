"""Heads are selected where the attention uses them, if something else needs the operand whole."""

import pytest
import torch
from torch import nn

import fxslim
from tests.models import (
    HEAD_DIM,
    HEADS,
    WIDTH,
    Attention,
    Residual,
    example,
    grouped_core,
    merge,
    split,
)
from tests.zoo.reference import call_of, compare, without_heads

INNER = HEADS * HEAD_DIM


class QueryNorm(Attention):
    """A norm over all heads of the queries."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(INNER)

    def heads(self, x):
        return split(self.norm(self.q(x))), split(self.k(x)), split(self.v(x))


class LayerOverValues(Attention):
    """A gate made by another call of the layer that projects the values."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return super().forward(x) * self.gate(self.v(x)).sigmoid()


class Shared(Attention):
    """A layer over the very tensor of values that the attention sums."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(INNER, WIDTH)

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.o(merge(self.core(q, k, v))) * self.gate(merge(v)).sigmoid()


class Cached(Attention):
    """Keys and values are outputs, as those of a cache are."""

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.o(merge(self.core(q, k, v))), k


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("model", "whole"),
    [
        (LayerOverValues(), {"v", "gate"}),
        (Shared(), {"v", "gate"}),
        (Cached(), {"k"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_else_is_read_stays_whole(model, whole, dynamic):
    program = fxslim.capture(model, example(), dynamic=dynamic)
    (site,) = fxslim.find_attention(program)
    assert site.prunable
    assert (site.num_heads, site.num_kv_heads, site.kind) == (HEADS, HEADS, "mha")
    assert [p.weight for p in (*site.query, *site.key)] == ["q.weight", "k.weight"]
    plan = fxslim.PruningPlan({site.name: [0, 3]}, 0.5)
    slim = fxslim.narrow(program, plan)
    fxslim.verify(slim, fxslim.insert_head_masks(program), plan)
    for call in (call_of((example(),)), *[call_of((example(2, 7),))] * dynamic):
        reference = without_heads(model, [site], plan.kept)
        assert compare(call.on(slim), call.on(reference)).relative < 1e-5
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    same = {n.split(".")[0] for n, p in slim.named_parameters() if p.numel() == sizes[n]}
    assert whole <= same
    assert not same & ({"q", "k", "v"} - whole)


def test_a_slim_program_is_pruned_again():
    model = LayerOverValues()
    program = fxslim.capture(model, example())
    once = fxslim.narrow(program, fxslim.PruningPlan({"attention": [0, 1, 3]}, 0.25))
    (site,) = fxslim.find_attention(once)
    assert site.num_heads == 3
    twice = fxslim.narrow(once, fxslim.PruningPlan({"attention": [0, 2]}, 0.5))
    reference = without_heads(model, fxslim.find_attention(program), {"attention": [0, 3]})
    torch.testing.assert_close(twice(x := example(2, 7)), reference(x))


def test_a_norm_over_all_heads_of_the_queries_couples_them():
    (site,) = fxslim.find_attention(fxslim.capture(QueryNorm(), example()))
    assert not site.prunable
    assert site.reason == "layer_norm (layer_norm in norm) normalises over all of the head axis"


class SortedContext(Attention):
    """An attention whose context says nothing of which head is which."""

    def context(self, x):
        return merge(self.core(*self.heads(x)).sort(1).values)


def test_a_layer_that_shares_a_weight_with_one_before_it_is_free_of_its_coupling():
    model = Residual(a=SortedContext(), b=Attention()).eval()
    model.layers.b.q = model.layers.a.q
    program = fxslim.capture(model, example())
    first, second = fxslim.find_attention(program)
    assert "sort (sort in layers.a) reads the head axis as a whole" in first.reason
    assert (second.prunable, second.reason) == (True, "")
    slim = fxslim.compile(program, 0.5)
    assert slim.layers.b.k.weight.shape[0] == model.layers.b.k.weight.shape[0] // 2


@pytest.mark.parametrize("kv_heads", [1, HEADS])
def test_a_layer_that_shares_a_bias_too_selects_from_both(kv_heads):
    """It has no head axis of a projection of its own, and the bias has the other layer's."""
    bias = nn.Parameter(torch.randn(HEADS, 1, 1))

    def core(q, k, v):
        return ((q @ k.mT).relu() * bias).softmax(-1) @ v.expand(-1, HEADS, -1, -1)

    model = Residual(a=Attention(kv_heads, core), b=SortedContext(kv_heads, core))
    model.bias = bias
    model.layers.b.q = model.layers.a.q
    program = fxslim.capture(model, x := example())
    first, second = fxslim.find_attention(program)
    assert (first.prunable, second.prunable) == (True, False)
    assert "sort (sort in layers.b) reads the head axis as a whole" in second.reason
    slim = fxslim.narrow(program, fxslim.PruningPlan({first.name: [1, 3]}, 0.25))
    with torch.no_grad():
        model.layers.a.o.weight[:, [0, 1, 4, 5]] = 0
    torch.testing.assert_close(slim(x), model(x))


class Biased(Attention):
    """Heads that have a bias each, added to their scores; these may talk before."""

    def __init__(self, bias, kv_heads=HEADS, repeated=torch.clone, talks=False):
        super().__init__(kv_heads)
        self.bias, self.repeated = bias, repeated
        self.talk = nn.Linear(HEADS, HEADS, bias=False) if talks else nn.Identity()

    def context(self, x):
        q, k, v = self.heads(x)
        scores = self.talk((q @ self.repeated(k).mT).movedim(1, 3)).movedim(3, 1)
        return merge((scores + self.bias).softmax(-1) @ self.repeated(v))


def interleaved(x):
    """Each KV head for two query heads that lie beside each other."""
    return x.repeat_interleave(2, 1)


def tiled(x):
    """Each KV head for every other query head."""
    return x.repeat(1, 2, 1, 1)


def test_a_bias_of_layers_that_group_otherwise_and_share_their_keys_is_selected_from():
    """Together the layers' groups lie across each other, and neither had heads."""
    bias = nn.Parameter(torch.randn(HEADS, 1, 1))
    model = Residual(a=Biased(bias, 2, tiled), b=Biased(bias, 2, interleaved))
    model.layers.b.k = model.layers.a.k
    program = fxslim.capture(model, x := example())
    first, second = fxslim.find_attention(program)
    assert (first.unit, second.unit) == (((0, 2), (1, 3)), ((0, 1), (2, 3)))
    plan = fxslim.PruningPlan({first.name: [1, 3], second.name: [2, 3]}, 0.5)
    slim = fxslim.narrow(program, plan)
    torch.testing.assert_close(slim(x), without_heads(model, [first, second], plan.kept)(x))


def test_a_bias_that_is_added_to_heads_that_talked_is_selected_from():
    """Only after they talked have they the bias's heads, and those of the values."""
    bias = nn.Parameter(torch.randn(HEADS, 1, 1))
    model = Residual(a=Biased(bias), b=Biased(bias, talks=True))
    model.layers.b.v = model.layers.a.v
    program = fxslim.capture(model, x := example())
    first, second = fxslim.find_attention(program)
    assert (first.prunable, second.prunable) == (True, False)
    plan = fxslim.PruningPlan({first.name: [0, 2]}, 0.25)
    slim = fxslim.narrow(program, plan)
    torch.testing.assert_close(slim(x), without_heads(model, [first], plan.kept)(x))


def test_one_weight_for_all_three_is_refused():
    class Stacked(Attention):
        def __init__(self):
            super().__init__()
            self.qkv, self.gate = nn.Linear(WIDTH, 3 * INNER), nn.Linear(INNER, WIDTH)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(-3)
            context = self.core(*(t.transpose(1, 2) for t in (q, k, v)))
            return self.o(merge(context)) * self.gate(v.flatten(-2))

    (site,) = fxslim.find_attention(fxslim.capture(Stacked(), example()))
    assert not site.prunable


def test_heads_that_talk_before_the_softmax_are_refused_though_values_could_be_selected():
    """One weight for all three makes the queries' heads those of the values."""

    class Talking(Attention):
        def __init__(self):
            super().__init__()
            self.qkv, self.talk = nn.Linear(WIDTH, 3 * INNER), nn.Linear(HEADS, HEADS, bias=False)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
            scores = self.talk((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.o(merge(scores.softmax(-1) @ v))

    (site,) = fxslim.find_attention(fxslim.capture(Talking(), example()))
    mixes = "linear (linear_1 in talk) mixes the heads before their context is complete"
    assert site.reason == mixes


def test_a_norm_over_the_context_is_refused_as_before():
    class ContextNorm(QueryNorm):
        def heads(self, x):
            return Attention.heads(self, x)

        def context(self, x):
            return self.norm(super().context(x))

    (site,) = fxslim.find_attention(fxslim.capture(ContextNorm(), example()))
    assert site.reason == "layer_norm (layer_norm in norm) normalises over all of the head axis"


def test_grouped_heads_are_selected_so_that_their_keys_and_values_go_too():
    """With the queries alone selected, only query heads could go, and no values."""

    class Grouped(Attention):
        def __init__(self):
            super().__init__(kv_heads=2, core=grouped_core)
            self.over_q, self.over_k = nn.Linear(INNER, WIDTH), nn.Linear(2 * HEAD_DIM, WIDTH)

        def forward(self, x):
            q, k, v = self.heads(x)
            gate = self.over_q(merge(q)) + self.over_k(merge(k))
            return self.o(merge(self.core(q, k, v))) * gate.sigmoid()

    program = fxslim.capture(Grouped(), example())
    (site,) = fxslim.find_attention(program)
    assert (site.kind, site.num_kv_heads, site.unit) == ("gqa", 2, ((0, 1), (2, 3)))
    slim = fxslim.narrow(program, fxslim.PruningPlan({site.name: [2, 3]}, 0.5))
    assert slim.get_parameter("v.weight").shape == (HEAD_DIM, WIDTH)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_query_heads_go_where_a_layer_needs_all_values(kv_heads):
    """As many of each group, so that keys and values stay; nothing has to be selected."""

    class OverValues(Attention):
        def __init__(self):
            super().__init__(kv_heads=kv_heads, core=grouped_core)
            self.over_v = nn.Linear(kv_heads * HEAD_DIM, WIDTH)

        def forward(self, x):
            q, k, v = self.heads(x)
            return self.o(merge(self.core(q, k, v))) * self.over_v(merge(v)).sigmoid()

    program = fxslim.capture(OverValues(), example())
    (site,) = fxslim.find_attention(program)
    groups = range(0, HEADS, HEADS // kv_heads)
    assert site.unit == tuple(tuple(g + n for g in groups) for n in range(HEADS // kv_heads))
    slim = fxslim.narrow(program, fxslim.PruningPlan({site.name: list(site.unit[1])}, 0.5))
    assert slim.get_parameter("q.weight").shape == (len(groups) * HEAD_DIM, WIDTH)
    assert slim.get_parameter("v.weight").shape == program.get_parameter("v.weight").shape
    assert "index_select" not in slim.code


def test_layers_that_select_other_heads_of_one_bias_are_pruned_again():
    """The runs that they select overlap by one head: the bias is no sum of such pieces."""

    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.randn(HEADS, 5, 5))
            self.one, self.other = (Attention(core=self.core) for _ in range(2))

        def core(self, q, k, v):
            return (q @ k.mT + self.bias).softmax(-1) @ v

        def forward(self, x):
            return self.other(self.one(x))

    program = fxslim.capture(Biased(), example(), dynamic=False)
    once = fxslim.narrow(program, fxslim.PruningPlan({"one": [0, 1], "other": [1, 2, 3]}, 0.4))
    assert [site.prunable for site in fxslim.find_attention(once)] == [True, True]
    twice = fxslim.narrow(once, fxslim.PruningPlan({"one": [1], "other": [0, 2]}, 0.4))
    direct = fxslim.narrow(program, fxslim.PruningPlan({"one": [1], "other": [1, 3]}, 0.6))
    torch.testing.assert_close(twice(x := example()), direct(x))
