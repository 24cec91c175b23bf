"""Verification: rounding passes, a wrong program does not, and the first wrong site is named."""

import copy
import re

import pytest
import torch
from torch import fx, nn

import fxslim
from fxslim.locate import locate
from tests.models import Attention, Residual, example

PLAN = fxslim.PruningPlan({"layers.a": [0, 2], "layers.b": [1], "layers.c": [3]}, 0.5)


@pytest.fixture
def programs():
    """A program of three attentions, masked and slim by one plan."""
    torch.manual_seed(0)
    program = fxslim.capture(Residual(a=Attention(), b=Attention(), c=Attention()), example())
    return program, fxslim.insert_head_masks(program), fxslim.narrow(program, PLAN)


def test_the_difference_of_a_right_program_is_rounding(programs):
    _, masked, slim = programs
    assert fxslim.verify(slim, masked, PLAN) < 1e-5
    assert fxslim.verify(slim, masked, PLAN, inputs=example(2, 9)) < 1e-5


@pytest.mark.parametrize("site", ["layers.a", "layers.b", "layers.c"])
def test_the_first_wrong_site_is_named(programs, site):
    program, masked, slim = programs
    with torch.no_grad():
        slim.get_parameter(f"{site}.v.weight").flatten()[0] += 0.1
    said = rf"^output 0 of the slim program differs .*; the first site that differs is '{site}' \("
    with pytest.raises(fxslim.VerificationError, match=said):
        fxslim.verify(slim, masked, PLAN, locate(program).attentions)


def test_the_heads_of_another_plan_are_wrong(programs):
    _, masked, slim = programs
    other = fxslim.PruningPlan(PLAN.kept | {"layers.a": [0, 3]}, 0.5)
    with pytest.raises(fxslim.VerificationError):
        fxslim.verify(slim, masked, other)


def test_a_difference_between_the_sites_is_said_to_be(programs):
    program, masked, slim = programs
    for node in slim.graph.nodes:
        if node.op == "output":
            (out,) = node.args[0]
            with slim.graph.inserting_before(node):
                node.replace_input_with(out, slim.graph.call_function(torch.neg, (out,)))
    slim.recompile()
    with pytest.raises(fxslim.VerificationError, match="no single site differs"):
        fxslim.verify(slim, masked, PLAN, locate(program).attentions)


def test_another_shape_or_number_of_outputs_is_wrong(programs):
    _, masked, slim = programs
    output = slim.graph.output_node()
    (out,) = output.args[0]
    with slim.graph.inserting_before(output):
        cut = slim.graph.call_function(torch.ops.aten.slice.Tensor, (out, 0, 0, 1))
    output.replace_input_with(out, cut)
    slim.recompile()
    with pytest.raises(fxslim.VerificationError, match=re.escape("by inf (rounding allows 0)")):
        fxslim.verify(slim, masked, PLAN)


def test_nan_is_no_agreement(programs):
    _, masked, slim = programs
    with torch.no_grad():
        slim.get_parameter("layers.c.v.bias")[0] = torch.nan
    with pytest.raises(fxslim.VerificationError, match="by inf"):
        fxslim.verify(slim, masked, PLAN)


def test_the_masks_are_left_as_they_were(programs):
    _, masked, slim = programs
    with torch.no_grad():
        masked.get_parameter("head_masks.layers/b").fill_(0.5)
    before = copy.deepcopy(masked.state_dict())
    fxslim.verify(slim, masked, PLAN)
    after = masked.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in masked.head_masks.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rounding_depends_on_the_type(dtype):
    model = Residual(a=Attention(), b=Attention()).to(dtype)
    slim = fxslim.compile(model, 0.5, example().to(dtype))
    difference = slim.meta["fxslim"].max_difference
    assert difference < {torch.float64: 1e-12}.get(dtype, 0.05)


def test_dropout_does_not_make_a_difference():
    class Dropped(Attention):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    model = fx.symbolic_trace(Residual(a=Dropped(), b=Dropped()).train())
    slim, x = fxslim.compile(model, 0.5, example()), example()
    assert slim.meta["fxslim"].max_difference < 1e-5
    assert not torch.equal(slim(x), slim(x))


NOISE = {
    "added": lambda y: y + torch.randn_like(y),
    "multiplied": lambda y: y * torch.bernoulli(torch.full_like(y, 0.5)),
    "some positions": lambda y: y[:, torch.rand(y.shape[1]).argsort()[:3]],
}


@pytest.mark.parametrize("kind", NOISE)
def test_noise_is_the_same_on_both_sides(kind):
    class Noisy(Attention):
        def forward(self, x):
            return NOISE[kind](super().forward(x))

    model, x = Noisy().eval(), example()
    slim = fxslim.compile(model, 0.5, x)
    assert slim.meta["fxslim"].max_difference < 1e-5
    assert not torch.equal(slim(x), slim(x))
    pruning = fxslim.prepare_pruning(model, {"end_step": 1}, example_inputs=x)
    assert list(pruning.pruners[0].head_masks) == ["attention"]


def test_weights_on_meta_are_not_compared():
    with torch.device("meta"):
        model, x = Attention(), example()
    slim = fxslim.compile(model, 0.5, x, criterion="random")
    assert slim.meta["fxslim"].max_difference is None
    assert slim.q.weight.shape == (4, 6)
    assert slim.q.weight.is_meta
