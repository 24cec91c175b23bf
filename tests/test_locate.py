"""Sites: which attentions are found, which positions are whose, and why some are refused."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import fxslim
from tests.models import (
    HEAD_DIM,
    WIDTH,
    Attention,
    Residual,
    captured,
    example,
    grouped_core,
    merge,
    split,
)
from tests.models import softmax_core as plain_core
from tests.zoo import build
from tests.zoo.reference import call_of, compare, without_heads


@functools.cache
def found(name):
    """The sites of a hand-written model."""
    return fxslim.find_attention(captured(name)[-1])


def sites_of(model, *inputs):
    return fxslim.find_attention(fxslim.capture(model, inputs or (example(),)))


def reasons(sites):
    assert not any(site.prunable for site in sites)
    return [site.reason for site in sites]


# ------------------------------------------------------------------------------- names and kinds


@pytest.mark.parametrize(
    "region", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["grad", "cast"]
)
def test_attention_in_a_region_is_called_as_its_weights_are(region):
    """PyTorch keeps no module paths of what is in a region."""

    class Region(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Residual(a=Attention(), b=Attention())

        def forward(self, x):
            with region():
                return self.model(x)

    sites = fxslim.find_attention(fxslim.capture(Region(), example()))
    assert [site.name for site in sites] == ["model.layers.a", "model.layers.b"]


def test_a_site_says_where_it_is_and_what_kind():
    model = Residual(
        a=Attention(), b=Attention(kv_heads=2, core=grouped_core), c=Attention(1, plain_core)
    )
    sites = sites_of(model)
    told = [(s.name, s.kind, s.is_cross, s.num_heads, s.num_kv_heads, s.head_dim) for s in sites]
    assert told == [
        ("layers.a", "mha", False, 4, 4, HEAD_DIM),
        ("layers.b", "gqa", False, 4, 2, HEAD_DIM),
        ("layers.c", "mqa", False, 4, 1, HEAD_DIM),
    ]
    assert [site.unit for site in sites] == [
        ((0,), (1,), (2,), (3,)),
        ((0, 1), (2, 3)),
        ((0,), (1,), (2,), (3,)),
    ]
    assert all(site.prunable and site.reason == "" and site.coupled == () for site in sites)


def test_a_projection_names_its_weight_and_what_is_whose():
    (site,) = sites_of(Attention())
    names = [(p.weight, p.bias, p.dim) for p in (*site.query, *site.key, *site.value, *site.output)]
    assert names == [
        ("q.weight", "q.bias", 0),
        ("k.weight", "k.bias", 0),
        ("v.weight", "v.bias", 0),
        ("o.weight", None, 1),
    ]
    positions = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [p.index.tolist() for p in (*site.query, *site.output)] == [positions, positions]


def test_a_model_that_is_an_attention_has_a_site_of_that_name():
    assert [site.name for site in sites_of(Attention())] == ["attention"]


def test_cross_attention_is_told_from_self_attention():
    told = [(site.name, site.is_cross) for site in found("transformer-decoder-layer")]
    assert told == [("self_attn", False), ("multihead_attn", True)]


def test_a_layer_that_is_called_again_is_numbered_and_coupled():
    names = [f"layers.0.layer.attention{number}" for number in ("", "@2", "@3")]
    sites = found("albert")
    assert [site.name for site in sites] == names
    for site in sites:
        assert site.coupled == tuple(name for name in names if name != site.name)


def test_attentions_side_by_side_before_one_projection_are_two():
    class SideBySide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Attention(), Attention(kv_heads=1, core=plain_core)
            self.o = nn.Linear(2 * 4 * HEAD_DIM, WIDTH)

        def forward(self, x):
            return self.o(torch.cat([self.a.context(x), self.b.context(x)], -1))

    model = SideBySide()
    program, x = fxslim.capture(model, example()), example(2, 7)
    first, second = fxslim.find_attention(program)
    assert [(s.kind, s.num_heads, s.coupled) for s in (first, second)] == [
        ("mha", 4, ()),
        ("mqa", 4, ()),
    ]
    kept = {first.name: [0, 2], second.name: [3]}
    slim = fxslim.narrow(program, fxslim.PruningPlan(kept, 5 / 8))
    with torch.no_grad():
        model.o.weight[:, [2, 3, 6, 7, *range(8, 14)]] = 0
    torch.testing.assert_close(slim(x), model(x))


def test_attentions_whose_queries_come_from_one_weight_are_one():
    """Every other weight carries half of the heads."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Attention(), Attention(core=plain_core)
            self.q, self.o = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

        def forward(self, x):
            contexts = []
            for own, q in zip((self.a, self.b), self.q(x).chunk(2, -1), strict=True):
                contexts.append(merge(own.core(split(q), split(own.k(x)), split(own.v(x)))))
            return self.o(torch.cat(contexts, -1))

    model = Halves()
    program, x = fxslim.capture(model, example()), example(2, 7)
    (site,) = fxslim.find_attention(program)
    assert (site.kind, site.num_heads) == ("mha", 8)
    rows = {p.weight: p.row_of.tolist() for p in (*site.query, *site.key)}
    first, second = [0, 1, 2, 3, -1, -1, -1, -1], [-1, -1, -1, -1, 0, 1, 2, 3]
    assert rows == {"q.weight": list(range(8)), "a.k.weight": first, "b.k.weight": second}
    slim = fxslim.narrow(program, fxslim.PruningPlan({site.name: [0, 2, 7]}, 5 / 8))
    assert slim.get_parameter("a.k.weight").shape == (2 * HEAD_DIM, WIDTH)
    with torch.no_grad():
        model.o.weight[:, [2, 3, 6, 7, *range(8, 14)]] = 0
    torch.testing.assert_close(slim(x), model(x))


def test_layers_that_share_only_a_bias_table_are_free_of_each_other():
    assert [(site.prunable, site.coupled) for site in found("t5-bias")] == [(True, ())] * 2


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("gqa-repeat-interleave", ((0, 1), (2, 3))),
        ("gqa-expand", ((0, 1), (2, 3))),
        ("gqa-native", ((0, 1), (2, 3))),
        ("gqa-broadcast", ((0, 1), (2, 3))),
        ("gqa-tiled", ((0, 2), (1, 3))),
    ],
)
def test_query_heads_go_with_their_kv_head(name, units):
    for site in found(name):
        assert (site.kind, site.num_kv_heads, site.unit) == ("gqa", 2, units)


@pytest.mark.parametrize("form", ["separate", "concatenated", "fused"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (6, 3), (8, 4)])
def test_the_unit_is_the_group_whichever_is_larger(heads, kv_heads, form):
    widths = [n * HEAD_DIM for n in (heads, kv_heads, kv_heads)]

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            columns = [sum(widths)] if form == "fused" else widths
            self.qkv = nn.ModuleList(nn.Linear(WIDTH, n) for n in columns)
            self.o = nn.Linear(heads * HEAD_DIM, WIDTH)

        def forward(self, x):
            made = [linear(x) for linear in self.qkv]
            if form != "separate":
                made = torch.cat(made, -1).split(widths, -1)
            q, k, v = map(split, made)
            return self.o(merge(grouped_core(q, k, v)))

    (site,) = sites_of(Grouped())
    assert len(site.unit) == kv_heads
    numbers = torch.arange(heads).view(kv_heads, -1).tolist()
    assert [list(unit) for unit in site.unit] == numbers


# ---------------------------------------------------------------------- whose positions are whose

ARRANGEMENTS = [
    "nanogpt",
    "fused-interleaved",
    "fused-unbind",
    "einops-vit",
    "einsum",
    "bmm-merged",
    "conv-attention",
    "ddpm-attention",
    "gqa-expand",
    "gqa-tiled",
    "mha-batch-first",
    "mha-cross-batch-first",
    "mha-cross-other-width",
    "parallel",
    "joined",
]


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_positions_of_a_head_are_those_that_make_it(name):
    model, inputs, _ = captured(name)
    _check_positions(model, call_of(inputs), found(name)[-1])


def test_positions_of_a_head_in_a_conv1d_weight():
    model, inputs = build("gpt2", "eager")
    site = fxslim.find_attention(fxslim.capture(model, inputs))[1]
    assert (site.query[0].weight, site.query[0].dim) == ("transformer.h.1.attn.c_attn.weight", 1)
    _check_positions(model, call_of(inputs), site)


def _check_positions(model, call, site):
    """A head without its output is one without its value; its query and key then do not matter."""
    dense = call.on(model)
    for number in (0, len(site.unit) - 1):
        heads = site.unit[number]
        silent = _zeroed(model, site.output, heads)
        assert compare(call.on(silent), dense).relative > 1e-4
        without_value = _zeroed(model, site.value, _rows(site, site.value, number))
        assert compare(call.on(without_value), call.on(silent)).relative < 1e-4
        for projections in (site.query, site.key):
            rows = _rows(site, projections, number)
            assert compare(call.on(_zeroed(model, projections, rows)), dense).relative > 1e-6
            both = _zeroed(silent, projections, rows)
            assert compare(call.on(both), call.on(silent)).relative < 1e-6


def _rows(site, projections, number):
    """The rows of a projection's index that belong to a unit."""
    count = len(projections[0].index)
    return site.unit[number] if count == site.num_heads else [number]


def _zeroed(model, projections, rows):
    """A copy of the model with zeros where these projections have those heads."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    for projection in projections:
        positions = projection.index[list(rows)].flatten()
        parameters[projection.weight].data.index_fill_(projection.dim, positions, 0)
        if projection.bias is not None:
            parameters[projection.bias].data[positions] = 0
    return model


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "norm-over-heads",
            "layer_norm (layer_norm_1 in layers.0.attention.output.0) normalises over all of "
            "the head axis",
        ),
        (
            "returned-weights",
            "the head axis is a size of the graph's output: softmax (softmax); capture the model "
            "without it",
        ),
        ("mha-averaged-weights", "mean (mean in attention) reads the head axis as a whole"),
        (
            "talking-heads",
            "its heads are mixed with each other between the query and the scores",
        ),
        (
            "softmax-over-heads",
            "sum (sum_1 in layers.0.attention) mixes the heads before their context is complete",
        ),
        (
            "unprojected",
            "its heads are channels of what it is made from: no output projection comes before its "
            "context is added to that",
        ),
    ],
)
def test_a_refusal_says_why(name, reason):
    assert reasons(found(name))[0] == reason


def test_heads_mixed_after_the_softmax_are_refused():
    class TalkingAfter(Attention):
        def __init__(self):
            super().__init__()
            self.talk = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            q, k, v = (split(linear(x)) for linear in (self.q, self.k, self.v))
            p = (q @ k.mT).softmax(-1)
            return self.o(merge(torch.einsum("bhqk,gh->bgqk", p, self.talk) @ v))

    assert reasons(sites_of(TalkingAfter())) == [
        "its heads are mixed with each other between the scores and the values"
    ]


def beside_the_heads(use):
    """An attention whose probabilities are used for other values, too."""

    class Beside(Attention):
        def __init__(self):
            super().__init__()
            self.value, self.out = nn.Linear(WIDTH, 7), nn.Linear(7, WIDTH)

        def forward(self, x):
            q, k, v = (split(linear(x)) for linear in (self.q, self.k, self.v))
            p = (q @ k.mT).softmax(-1)
            return self.o(merge(p @ v)) + self.out(use(p) @ self.value(x))

    return Beside()


def test_a_head_that_something_else_uses_stays():
    """Zipformer's first head also mixes values of its own."""
    model = beside_the_heads(lambda p: p[:, 0])
    program, x = fxslim.capture(model, example()), example(2, 7)
    (site,) = fxslim.find_attention(program)
    assert (site.num_heads, site.prunable) == (3, True)
    for kept in [0, 2], []:
        slim = fxslim.narrow(program, fxslim.PruningPlan({site.name: kept}, 0.5))
        dense = without_heads(model, [site], {site.name: kept})
        torch.testing.assert_close(slim(x), dense(x))


def test_heads_that_something_else_sums_are_refused():
    """The reason names it."""
    (mean,) = reasons(sites_of(beside_the_heads(lambda p: p.mean(1))))
    assert mean == "mean (mean) reads the head axis as a whole"
    (total,) = reasons(sites_of(beside_the_heads(lambda p: p[:, :2].sum(1))))
    assert total == "sum (sum_1) mixes the heads before their context is complete"


@torch.library.custom_op("fxslim_tests::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    """An operator without a rule."""
    return x.flip(1)


mystery.register_fake(torch.empty_like)


def test_an_operator_without_a_rule_is_named():
    class Mysterious(Attention):
        def forward(self, x):
            q, k, v = (split(linear(x)) for linear in (self.q, self.k, self.v))
            return self.o(merge(mystery(scaled_dot_product_attention(q, k, v))))

    assert reasons(sites_of(Residual(a=Mysterious()))) == [
        "fxslim_tests::mystery (mystery in layers.a): fxslim_tests::mystery has no rule, so its "
        "effect on the heads is unknown; a row in fxslim/rules.py makes it known"
    ]


def test_a_reason_is_the_same_each_time():
    """Of two operators without a rule, the reason names the same one."""

    class Mysterious(Attention):
        def heads(self, x):
            q, k, v = (split(mystery(linear(x))) for linear in (self.q, self.k, self.v))
            return mystery(q), mystery(k), v

    program = fxslim.capture(Mysterious(core=plain_core), example())
    assert len({fxslim.find_attention(program)[0].reason for _ in range(20)}) == 1


def test_one_head_is_nothing_to_cut():
    class OneHead(Attention):
        def forward(self, x):
            q, k, v = self.q(x), self.k(x), self.v(x)
            return self.o(scaled_dot_product_attention(q, k, v))

    assert reasons(sites_of(OneHead())) == [
        "there is one head only, so there is no head axis to cut"
    ]


def test_a_context_that_nothing_sums_is_refused():
    class NoOutput(Attention):
        def __init__(self):
            super().__init__()
            self.o = nn.ReLU()

    (reason,) = reasons(sites_of(NoOutput()))
    assert reason.startswith("the head axis is a size of the graph's output")


def test_refusing_one_site_does_not_refuse_another():
    assert [site.prunable for site in found("one-of-three")] == [False, True, False]


@pytest.mark.parametrize(
    ("name", "attentions"),
    [("experts", 2), ("pooled", 2), ("memory", 0), ("class-scores", 0), ("squeeze-excite", 0)],
)
def test_a_softmax_that_is_no_attention_is_no_site(name, attentions):
    sites = found(name)
    assert len(sites) == attentions
    assert all(site.name.endswith("attention") and site.prunable for site in sites)
