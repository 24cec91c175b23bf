"""Programs: copied, pickled and saved without losing what they return or which names they use."""

import copy
import io
import pickle
from collections import namedtuple

import pytest
import torch
from torch import nn

import fxslim
from tests.models import Attention, example
from tests.zoo import build

Pair = namedtuple("Pair", "first second")


class Structured(nn.Module):
    """Takes a dict, returns a dict of a tuple and a tensor; has buffers of both kinds."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.register_buffer("shift", torch.randn(6))
        self.register_buffer("scale", torch.randn(6), persistent=False)
        self.register_buffer("unused", torch.randn(6))

    def forward(self, batch, double=False):
        y = (self.attention(batch["x"]) * self.scale + self.shift).contiguous()
        return {"pair": (y, y + 1), "sum": y.sum(1)}


def inputs(*sizes):
    return ({"x": example(*sizes)},)


@pytest.fixture
def slim():
    """A slim program of `Structured`."""
    torch.manual_seed(0)
    return fxslim.compile(Structured(), 0.5, inputs())


def assert_same(a, b):
    """Equal outputs of the same structure."""
    assert a.keys() == b.keys()
    assert isinstance(a["pair"], tuple)
    for one, other in zip([*a["pair"], a["sum"]], [*b["pair"], b["sum"]], strict=True):
        assert torch.equal(one, other)


def copies(program):
    yield copy.deepcopy(program)
    yield pickle.loads(pickle.dumps(program))
    stream = io.BytesIO()
    torch.save(program, stream)
    stream.seek(0)
    yield torch.load(stream, weights_only=False)


def test_inputs_and_outputs_have_the_models_structure(slim):
    (batch,) = inputs(2, 7)
    out = slim(batch)
    assert list(out) == ["pair", "sum"]
    assert [tuple(t.shape) for t in out["pair"]] == [(2, 7, 6)] * 2


def test_a_copy_computes_the_same_with_tensors_of_its_own(slim):
    (batch,) = inputs(2, 7)
    for other in copies(slim):
        assert_same(other(batch), slim(batch))
        assert other.meta["fxslim"] == slim.meta["fxslim"]
        assert (other.training, type(other).__name__) == (slim.training, type(slim).__name__)
        assert other.code == slim.code
        ours, theirs = slim.state_dict(), other.state_dict()
        assert list(ours) == list(theirs)
        assert not {t.data_ptr() for t in ours.values()} & {t.data_ptr() for t in theirs.values()}


def test_a_copy_is_a_program_that_can_be_worked_on():
    program = fxslim.capture(Structured(), inputs())
    other = copy.deepcopy(program)
    assert fxslim.find_attention(other) == fxslim.find_attention(program)
    slim = fxslim.compile(other, 0.5)
    assert slim.attention.q.weight.shape == (4, 6)
    assert other.attention.q.weight.shape == (8, 6)


def test_copies_keep_what_is_frozen_and_the_mode():
    model = Structured().eval()
    model.attention.v.weight.requires_grad_(False)
    slim = fxslim.compile(model, 0.5, inputs())
    for other in copies(slim):
        assert not other.training
        assert {n for n, p in other.named_parameters() if not p.requires_grad} == {
            "attention.v.weight"
        }


def test_the_state_dict_is_the_models_without_what_nothing_reads(slim):
    assert set(slim.state_dict()) == set(Structured().state_dict()) - {"unused"}
    for other in copies(slim):
        assert set(other.state_dict()) == set(slim.state_dict())


def test_a_state_dict_is_loaded_back(slim):
    (batch,) = inputs()
    other = copy.deepcopy(slim)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not torch.equal(other(batch)["sum"], slim(batch)["sum"])
    other.load_state_dict(slim.state_dict())
    assert_same(other(batch), slim(batch))


def test_a_transformers_output_stays_one():
    model, example_inputs = build("bert")
    program = fxslim.capture(model, example_inputs)
    expected = type(model(**example_inputs))
    for other in (program, *copies(program)):
        out = other(**example_inputs)
        assert type(out) is expected
        assert out.logits.shape == (2, 12, 128)


def test_a_named_tuple_stays_one():
    class Named(Attention):
        def forward(self, x):
            y = super().forward(x)
            return Pair(y, [y + 1])

    x = example()
    out = fxslim.compile(Named(), 0.5, x)(x)
    assert type(out) is Pair
    assert type(out.second) is list
