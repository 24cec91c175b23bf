"""Removing a whole attention: zero is added to the residual stream, or the bias alone."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import fxslim
from tests.models import (
    HEAD_DIM,
    HEADS,
    WIDTH,
    Attention,
    Residual,
    captured,
    example,
    merge,
    printed,
    softmax_core,
    split,
)
from tests.zoo.reference import call_of, compare, without_heads


def without(model, program, *names):
    """The program without the named sites (all of them if none is named), and the reference."""
    sites = fxslim.find_attention(program)
    kept = {site.name: [] for site in sites if not names or site.name in names}
    slim = fxslim.narrow(program, fxslim.PruningPlan(kept, 1.0))
    return slim, without_heads(model, sites, kept)


def test_without_a_bias_nothing_is_left_of_it():
    model = Residual(a=Attention(bias=False), b=Attention(bias=False))
    program = fxslim.capture(model, example())
    slim, _ = without(model, program, "layers.a")
    assert {name.split(".")[1] for name in slim.state_dict()} == {"b"}
    nothing, _ = without(model, program)
    assert_expected_inline(printed(nothing), """x [as!, bs!, c6!] = placeholder x""")
    assert nothing.state_dict() == {}
    x = example(2, 7)
    assert torch.equal(nothing(x), x)


@pytest.mark.parametrize(("kept", "concatenations"), [([1], 0), ([0, 2], 1)])
def test_what_is_empty_is_left_out_of_a_concatenation(kept, concatenations):
    """A head with weights of its own goes with them; of one that stays alone nothing is joined."""

    class Apart(Attention):
        def __init__(self):
            super().__init__()
            self.v = nn.ModuleList(nn.Linear(WIDTH, HEAD_DIM) for _ in range(HEADS))

        def heads(self, x):
            value = torch.cat([linear(x) for linear in self.v], -1)
            return split(self.q(x)), split(self.k(x)), split(value)

    model, x = Apart(), example(2, 7)
    program = fxslim.capture(model, example())
    slim = fxslim.narrow(program, fxslim.PruningPlan({"attention": kept}, 0.5))
    assert {n.split(".")[1] for n, _ in slim.named_parameters() if n[0] == "v"} == set(
        map(str, kept)
    )
    targets = [node.target for node in slim.graph.nodes]
    assert targets.count(torch.ops.aten.cat.default) == concatenations
    assert torch.ops.aten.full.default not in targets
    reference = without_heads(model, fxslim.find_attention(program), {"attention": kept})
    torch.testing.assert_close(slim(x), reference(x))


def test_a_bias_stays():
    model = Residual(a=Attention())
    slim, _ = without(model, fxslim.capture(model, example(), dynamic=False))
    assert_expected_inline(
        printed(slim),
        """\
layers_a_o_bias [a6!] = get_attr layers.a.o.bias
x [b3!, c5!, a6!] = placeholder x
expand_default [b3!, c5!, a6!] = expand(layers_a_o_bias, [3, 5, 6])
add [b3!, c5!, a6!] = add(x, expand_default)""",
    )
    assert set(slim.state_dict()) == {"layers.a.o.bias"}


@pytest.mark.parametrize(
    "name",
    [
        "alibi",
        "bmm-merged",
        "conv-attention",
        "einsum",
        "gqa-expand",
        "head-sink",
        "joined",
        "mha-cross-batch-first",
        "mha-sequence-first",
        "nanogpt-manual",
        "swin",
        "t5-bias",
    ],
)
def test_the_rest_computes_what_it_did(name):
    model, inputs, program = captured(name)
    call = call_of(inputs)
    slim, reference = without(model, program)
    assert compare(call.on(slim), call.on(reference)).relative < 1e-5
    assert not fxslim.find_attention(slim)
    left = {node.target for node in slim.graph.nodes}
    assert torch.ops.aten.scaled_dot_product_attention.default not in left
    assert torch.ops.aten.softmax.int not in left


def test_one_of_several_goes_and_the_others_lose_heads():
    model = Residual(a=Attention(), b=Attention(core=softmax_core), c=Attention())
    program, x = fxslim.capture(model, example()), example(2, 7)
    kept = {"layers.a": [1], "layers.b": [], "layers.c": [0, 3]}
    slim = fxslim.narrow(program, fxslim.PruningPlan(kept, 0.75))
    reference = without_heads(model, fxslim.find_attention(program), kept)
    torch.testing.assert_close(slim(x), reference(x))
    assert [site.name for site in fxslim.find_attention(slim)] == ["layers.a", "layers.c"]


def test_its_dropout_goes_too():
    layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.5, batch_first=True).train()
    program = fxslim.capture(layer, (torch.randn(3, 5, 8),))
    slim = fxslim.narrow(program, fxslim.PruningPlan({"self_attn": []}, 1.0))
    names = [node.name for node in slim.graph.nodes]
    assert "scaled_dot_product_attention" not in names
    assert slim.training
    assert slim(torch.randn(2, 7, 8)).shape == (2, 7, 8)


def test_compile_removes_one_only_when_told_to():
    model = Residual(a=Attention(), b=Attention())
    with torch.no_grad():
        model.layers.a.o.weight *= 0.01
    how = {"criterion": "output_fisher", "calibration": [example()]}
    kept = fxslim.compile(model, 0.5, example(), **how).meta["fxslim"].plan.kept
    assert [len(heads) for heads in kept.values()] == [1, 3]
    gone = fxslim.compile(model, 0.5, example(), min_heads=0, **how)
    assert [len(heads) for heads in gone.meta["fxslim"].plan.kept.values()] == [0, 4]
    assert not any(name.startswith("layers.a.v") for name in gone.state_dict())
    assert gone(example(2, 7)).shape == (2, 7, 6)


class Beside(Attention):
    """Convolutions as projections, and something beside the context before the output."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv1d(WIDTH, HEADS * HEAD_DIM, 1) for _ in range(3))
        self.other, self.o = nn.Linear(WIDTH, 3), nn.Linear(HEADS * HEAD_DIM + 3, WIDTH)

    def heads(self, x):
        return (split(conv(x.mT).mT) for conv in (self.q, self.k, self.v))

    def forward(self, x):
        return self.o(torch.cat([self.context(x), self.other(x)], -1))


class Flattened(Attention):
    """Sizes for the output projection that are read from the context."""

    def forward(self, x):
        context = self.context(x)
        batch, length, width = context.shape
        flat = torch.addmm(self.o.bias, context.reshape(batch * length, width), self.o.weight.T)
        return flat.view(batch, length, WIDTH)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("model", [Beside(), Flattened()], ids=["beside", "flattened"])
def test_nothing_is_left_of_an_attention_without_heads(model, dynamic):
    program = fxslim.capture(model, (example(),), dynamic=dynamic)
    (site,) = fxslim.find_attention(program)
    plan = fxslim.PruningPlan({site.name: []}, 1.0)
    slim = fxslim.narrow(program, plan)
    fxslim.verify(slim, fxslim.insert_head_masks(program), plan)
    assert all(parameter.numel() for parameter in slim.parameters())
    assert fxslim.find_attention(slim) == []


def test_a_length_is_not_read_where_heads_go():
    """Four heads and four learned queries, each merged with the batch: one expression for both."""

    class Pool(Attention):
        def __init__(self):
            super().__init__()
            self.latents = nn.Parameter(torch.randn(4, WIDTH))

        def forward(self, x):
            queries = split(self.q(self.latents.expand(x.shape[0], -1, -1)))
            context = scaled_dot_product_attention(queries, split(self.k(x)), split(self.v(x)))
            return self.o(merge(context).flatten(0, 1)).unflatten(0, (x.shape[0], 4))

    def merged(q, k, v):
        flat = (y.reshape(-1, *y.shape[2:]) for y in (q, k, v))
        return softmax_core(*flat).view(*q.shape)

    model = nn.Sequential(Residual(a=Attention(core=merged)), Pool())
    program, x = fxslim.capture(model, example()), example(2, 7)
    (a, pool) = fxslim.find_attention(program)
    kept = {a.name: [1], pool.name: []}
    slim = fxslim.narrow(program, fxslim.PruningPlan(kept, 7 / 8))
    torch.testing.assert_close(slim(x), without_heads(model, [a, pool], kept)(x))
