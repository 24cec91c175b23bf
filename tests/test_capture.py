"""Capture: what goes in, what comes out, and what is said when it cannot be done."""

import copy
import dataclasses
import functools
import math
import re
from contextlib import suppress

import numpy as np
import pytest
import torch
import transformers
from torch import fx, nn

import fxslim
from fxslim import graph
from fxslim.examples import example_inputs_for
from tests.models import (
    HEAD_DIM,
    HEADS,
    WIDTH,
    Attention,
    Residual,
    example,
    merge,
    softmax_core,
    split,
)
from tests.zoo import build
from tests.zoo.reference import without_heads


def notes(program):
    """What capture decided on the way."""
    return program.meta["capture"]


class TwoInputs(nn.Module):
    """Attention over hidden states that are scaled by a second input."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x, scale=None):
        return {"y": self.attention(x if scale is None else x * scale)}


# ------------------------------------------------------------------------------------ what goes in


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "keywords"])
def test_inputs_are_a_tensor_positional_or_keyword(form):
    x, model = example(), Attention()
    inputs = {"tensor": x, "tuple": (x,), "list": [x], "keywords": {"x": x}}[form]
    program = fxslim.capture(model, inputs)
    got = program(x=x) if form == "keywords" else program(x)
    torch.testing.assert_close(got, model(x))


def test_only_the_inputs_given_are_inputs_of_the_program():
    x, scale, model = example(), torch.rand(3, 1, 1), TwoInputs()
    one, two = fxslim.capture(model, (x,)), fxslim.capture(model, {"x": x, "scale": scale})
    torch.testing.assert_close(one(x), model(x))
    torch.testing.assert_close(two(x=x, scale=scale), model(x, scale))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'scale'"):
        two(x)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ((), "example_inputs must be a tensor, a tuple (positional) or a dict (keyword) of inputs, "
         "not tuple that is empty"),
        (3, "example_inputs must be a tensor, a tuple (positional) or a dict (keyword) of inputs, "
         "not int"),
    ],
)  # fmt: skip
def test_inputs_of_another_form_are_refused(inputs, said):
    with pytest.raises(TypeError, match=f"^{re.escape(said)}$"):
        fxslim.capture(Attention(), inputs)


@pytest.mark.parametrize(
    ("first", "shape", "dtype"),
    [
        (nn.Embedding(20, WIDTH), (2, 11), torch.int64),
        (nn.Linear(9, WIDTH), (2, 11, 9), torch.float32),
        (nn.Linear(9, WIDTH).double(), (2, 11, 9), torch.float64),
    ],
)
def test_inputs_are_derived_from_the_first_layer(first, shape, dtype):
    program = fxslim.capture(nn.Sequential(first, Attention().to(first.weight.dtype)))
    ((x,), kwargs) = program.meta["example_inputs"]
    assert (x.shape, x.dtype, kwargs) == (shape, dtype, {})


def test_pictures_are_derived_from_a_first_convolution():
    picture = nn.Sequential(nn.Conv2d(3, WIDTH, 4, 4), nn.Flatten(2))
    program = fxslim.capture(picture)
    ((x,), _) = program.meta["example_inputs"]
    assert x.shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", {"input_ids": (2, 11), "attention_mask": (2, 11)}),
        ("vit", {"pixel_values": (2, 3, 32, 32)}),
        (
            "t5",
            {"input_ids": (2, 11), "attention_mask": (2, 11), "decoder_input_ids": (2, 7)},
        ),
    ],
)
def test_inputs_are_derived_from_a_transformers_config(name, expected):
    model, _ = build(name)
    inputs = example_inputs_for(model)
    assert {key: tuple(value.shape) for key, value in inputs.items()} == expected
    model(**inputs)


def test_inputs_that_cannot_be_derived_are_asked_for():
    said = (
        "no inputs can be derived for TransformerDecoderLayer (its forward requires: tgt, memory); "
        "pass example_inputs: a tuple of positional or a dict of keyword tensors, batch 2 or more"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        fxslim.capture(nn.TransformerDecoderLayer(8, 2))


# ---------------------------------------------------------------------------- before there is work


@pytest.mark.parametrize(
    ("model", "error", "said"),
    [
        ("bert", TypeError, "model must be a torch.nn.Module, not str"),
        (nn.ReLU(), ValueError, "ReLU has no parameters, so there is nothing to prune"),
    ],
)
def test_what_is_no_model_is_refused_first(model, error, said, monkeypatch):
    monkeypatch.setattr(torch.export, "export", None)  # it is not called
    with pytest.raises(error, match=f"^{said}$"):
        fxslim.capture(model)


def test_nan_weights_are_refused_first(monkeypatch):
    monkeypatch.setattr(torch.export, "export", None)
    model = Residual(a=Attention())
    with torch.no_grad():
        model.layers.a.k.bias[3] = torch.nan
    said = "parameter 'layers.a.k.bias' contains NaN; load or initialise the weights first"
    with pytest.raises(ValueError, match=f"^{said}$"):
        fxslim.capture(model)


# -------------------------------------------------------------------------------- symbolic lengths


def test_lengths_are_symbolic():
    model = Attention()
    program = fxslim.capture(model, example(3, 5))
    assert notes(program) == ("batch and sequence lengths are symbolic",)
    for sizes in [(1, 5), (3, 1), (8, 13)]:
        x = example(*sizes)
        torch.testing.assert_close(program(x), model(x))


def test_a_batch_of_one_does_not_fix_the_batch():
    model, x = Attention(), example(4, 7)
    program = fxslim.capture(model, example(1))
    torch.testing.assert_close(program(x), model(x))


class LearnedPositions(nn.Module):
    """One learned vector for each of five positions."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(5, WIDTH))
        self.attention = Attention()

    def forward(self, x):
        return self.attention(x + self.positions)


def test_a_length_that_the_model_fixes_is_a_warning_and_a_guard():
    said = "static sizes: the model takes 'x' of (symbolic, 5, 6) only"
    with pytest.warns(UserWarning, match=re.escape(f"fxslim.capture: {said}")):
        program = fxslim.capture(LearnedPositions(), example())
    assert notes(program) == (said,)
    assert program(example(8)).shape == (8, 5, WIDTH)
    with pytest.raises(AssertionError, match="input 'x' has another size in dimension 1 than"):
        program(example(3, 4))


def test_less_is_symbolic_where_more_does_not_export():
    class Numbered(Attention):
        def forward(self, x):
            numbers = torch.from_numpy(np.arange(x.shape[1]))
            return super().forward(x) + numbers.view(1, -1, 1)

    said = "static sequence length: only the batch size is symbolic"
    with pytest.warns(UserWarning, match=f"fxslim.capture: {said}"):
        program = fxslim.capture(Numbered(), example())
    assert notes(program) == (said,)
    assert program(example(8)).shape == (8, 5, WIDTH)


def test_an_example_that_is_a_view_is_no_other_than_its_copy():
    program = fxslim.capture(Attention(), example(3, 9)[:, :5])
    assert notes(program) == ("batch and sequence lengths are symbolic",)


def test_static_shapes_on_request_are_no_warning():
    program = fxslim.capture(Attention(), example(), dynamic=False)
    assert notes(program) == ("shapes fixed to the example's, as asked",)
    said = (
        "input 'x' has another size in dimension 0 than the program was captured for (3); "
        "capture it with such an example"
    )
    with pytest.raises(AssertionError, match=re.escape(said)):
        program(example(4))


def test_a_length_beyond_the_models_tables_is_refused_by_name():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.randn(9, WIDTH))
            self.attention = Attention()

        def forward(self, x):
            return self.attention(x + self.positions[: x.shape[1]])

    program = fxslim.capture(Table(), example())
    assert program(example(2, 9)).shape == (2, 9, WIDTH)
    with pytest.raises(AssertionError, match=r"input 'x' has another size .*\(at most 9\)"):
        program(example(2, 10))


class Padded(nn.Module):
    """A mask that is added where it is floating, and selects where it is boolean."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)

    def forward(self, x, mask):
        return self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0]


@pytest.mark.parametrize(("kind", "other"), [("bool", "float32"), ("float32", "bool")])
def test_another_dtype_is_refused(kind, other):
    x, padding = torch.randn(2, 5, 8), torch.arange(5) > torch.tensor([[2], [3]])
    masks = {"bool": padding, "float32": torch.zeros(2, 5).masked_fill(padding, -1e9)}
    model = Padded().eval()
    program = fxslim.capture(model, (x, masks[kind]))
    torch.testing.assert_close(program(x, masks[kind]), model(x, masks[other]))
    said = f"input 'mask' has another dtype than the program was captured for (torch.{kind}); "
    with pytest.raises(AssertionError, match=re.escape(said)):
        program(x, masks[other])


def test_a_program_can_be_cast():
    model, x = Attention().eval(), example()
    program = fxslim.capture(model, x).double()
    torch.testing.assert_close(program(x.double()), model.double()(x.double()))


class Branching(nn.Module):
    """An attention behind a layer that is called in one branch and not in the other."""

    def __init__(self, branch):
        super().__init__()
        self.layer, self.attention = nn.Linear(WIDTH, WIDTH), Attention()
        self.branch = branch

    def forward(self, x):
        return self.attention(self.branch(self.layer, x))


def in_chunks(layer, x):
    return x + sum(layer(chunk).sum(1, keepdim=True) for chunk in x.split(4, 1))


def if_odd(layer, x):
    return layer(x) if x.shape[1] % 2 else x


def if_few(layer, x):
    return layer(x) if x.shape[0] * x.shape[1] > 20 else x


def if_long(layer, x):
    return layer(x) if x.shape[1] > 5 else x


def if_square(layer, x):
    return layer(x) if x.shape[1] == x.shape[2] else x


def if_a_third(layer, x):
    return layer(x) if round(x.shape[1] / 3, 1) > 2 else x


def if_rounded(round_):
    def branch(layer, x):
        return layer(x) if round_(x.shape[1] / 4) * 4 != x.shape[1] else x

    return branch


@pytest.mark.parametrize(
    ("branch", "size", "said"),
    [
        (if_a_third, (2, 6), r"the sizes of the inputs .*round\(x.shape.1. / 3, 1\) > "),
        (if_rounded(math.ceil), (2, 8), r"the sizes of the inputs .*ceil\(x.shape.1. / 4\)"),
        (if_rounded(math.floor), (2, 8), r"the sizes of the inputs .*floor\(x.shape.1. / 4\)"),
        (if_rounded(round), (2, 8), r"the sizes of the inputs .*round\(x.shape.1. / 4\)"),
        (if_rounded(int), (2, 8), r"the sizes of the inputs .*trunc\(x.shape.1. / 4\)"),
        (in_chunks, (3, 16), "the sizes of the inputs are not those .*3 \\+ x.shape"),
        (if_odd, (2, 8), "the sizes of the inputs are not those .*x.shape.1. % 2"),
        (if_few, (3, 16), "the sizes of the inputs are not those .*x.shape.0.\\*x.shape.1. <= 20"),
        (if_long, (2, 4), "the sizes of the inputs are not those .*x.shape.1. > 5"),
        (if_square, (2, WIDTH), "the sizes of the inputs are not those .*x.shape.1. != 6"),
    ],
)
def test_a_branch_on_sizes_is_asserted(branch, size, said):
    """Tracing takes one side of it, and unrolls loops."""

    model = Branching(branch).eval()
    program = fxslim.capture(model, example(2, 7))
    slim = fxslim.compile(program, 0.5)
    assert notes(program) == ("batch and sequence lengths are symbolic",)
    x = example(1, 7)
    torch.testing.assert_close(program(x), model(x))
    for made in (program, slim):
        with pytest.raises(AssertionError, match=said):
            made(example(*size))


def if_many_are_positive(layer, x):
    return layer(x) if int((x[0, :, 0] > 0).sum()) > 3 else x


def if_one_is_large(layer, x):
    return layer(x) if x.max() > 2 else x


def as_often_as_positive(layer, x):
    for _ in range(int((x[0, :, 0] > 0).sum())):
        x = layer(x)
    return x


def where_listed(layer, x):
    flags = (x[0, :2, 0] > 0).long().tolist()
    return sum(layer(x) if flag else x for flag in flags)


@pytest.mark.parametrize(
    "branch", [if_many_are_positive, if_one_is_large, as_often_as_positive, where_listed]
)
def test_a_branch_on_values_is_the_examples_or_refused(branch, capsys):
    model = Branching(branch).eval()
    with pytest.warns(UserWarning, match="the model branches on values in its inputs"):
        program = fxslim.capture(model, torch.ones(2, 7, WIDTH))
    assert "def forward" not in capsys.readouterr().err  # as far as a try came
    slim = fxslim.compile(program, 0.5)
    done, refused = slim.meta["fxslim"], 0
    masked = without_heads(copy.deepcopy(model), done.sites, done.plan.kept)
    for factor in (1, 0.5, 3, -1, 1, 0.5):
        x = torch.ones(3 if factor == 0.5 else 2, 7, WIDTH) * factor
        x[0, 3:, 0] *= 1 if factor > 0 else -1
        try:
            out = slim(x)
        except RuntimeError as error:
            assert "the values of the inputs are not those the program" in str(error)  # noqa: PT017
            refused += 1
        else:
            torch.testing.assert_close(out, masked(x))
    assert 0 < refused < 6


def if_a_number_is_large(layer, x):
    return layer(x) if x.max().item() > 2 else x


def test_a_branch_that_the_program_would_not_assert_is_refused():
    """PyTorch forgets a number that is compared and nothing more."""
    model = Branching(if_a_number_is_large).eval()
    with pytest.raises(fxslim.CaptureError, match="Could not guard on data-dependent expression"):
        fxslim.capture(model, torch.ones(2, 7, WIDTH))
    with pytest.warns(UserWarning, match="captured in parts: attention"):
        slim = fxslim.compile(model, 0.5, (torch.ones(2, 7, WIDTH),))
    done = fxslim.Report.of(slim)
    masked = without_heads(copy.deepcopy(model), done.sites, done.plan.kept)
    for x in (torch.ones(2, 7, WIDTH), 3 * torch.ones(2, 7, WIDTH)):
        torch.testing.assert_close(slim(x), masked(x))


def test_a_part_that_takes_all_values_comes_before_a_program_that_does_not():
    model = Branching(if_one_is_large).eval()
    with pytest.warns(UserWarning, match="captured in parts: attention"):
        slim = fxslim.compile(model, 0.5, (torch.ones(2, 7, WIDTH),))
    for x in (torch.ones(2, 7, WIDTH), 3 * torch.ones(2, 7, WIDTH)):
        assert slim(x).shape == x.shape


def test_what_is_computed_once_for_all_stays_real():
    """A cache outside of the model is filled by a call, not by tracing."""

    @functools.lru_cache
    def swapped(width):
        numbers = torch.arange(width)
        return torch.where(numbers % 2 == 0, numbers + 1, numbers - 1)

    class Swapping(Attention):
        def forward(self, x):
            return super().forward(x[..., swapped(WIDTH)])

    model = Swapping().eval()
    for _ in range(2):
        fxslim.capture(model, example())
        assert type(model(example())) is torch.Tensor


def test_the_call_before_tracing_leaves_no_trace():
    class Counting(Attention):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return super().forward(x.mul_(2)) + torch.rand(())

    model, x = Counting().eval(), example()
    given, state = x.clone(), torch.get_rng_state()
    fxslim.capture(model, x)
    assert model.calls == 0
    assert x.equal(given)
    assert torch.get_rng_state().equal(state)


def test_what_the_model_may_change_is_not_handed_to_it_before_tracing():
    class Cache:
        calls = 0

    class Caching(Attention):
        def forward(self, x, cache):
            cache.calls += 1
            return super().forward(x)

    cache = Cache()
    with suppress(fxslim.CaptureError):  # torch.export takes no such object
        fxslim.capture(Caching().eval(), (example(), cache))
    assert cache.calls == 0


def test_a_batch_of_one_that_the_model_fixes_stays_one():
    """It is doubled in the hope of a symbol; where that fails, two is not what was asked for."""

    class OneByOne(Attention):
        def forward(self, x):
            return torch.stack([row @ row.T for row in super().forward(x)])

    with pytest.warns(UserWarning, match=re.escape("takes 'x' of (1, symbolic, 6) only")):
        program = fxslim.capture(OneByOne(), example(1))
    assert program(example(1, 9)).shape == (1, 9, 9)
    assert fxslim.compile(program, 0.5).meta["fxslim"].max_difference < 1e-6


def test_a_batch_of_one_on_another_side_of_a_branch_stays_one():
    """Doubled, it would be captured for what the model does to larger inputs."""

    class Halved(Attention):
        def forward(self, x):
            return super().forward(x / 2 if x.shape[0] * x.shape[1] > 9 else x)

    model, x = Halved(), example(1, 7)
    with pytest.warns(UserWarning, match=re.escape("takes 'x' of (1, symbolic, 6) only")):
        program = fxslim.capture(model, x)
    torch.testing.assert_close(program(x), model(x))
    with pytest.raises(AssertionError, match=r"dimension 1 .* \(at most 9\); capture"):
        program(example(1, 10))


def test_how_a_view_is_laid_out_is_no_branch_of_the_model():
    """PyTorch compares its sizes with those of a batch of one; Enformer's length fixes the rest."""

    class Shifted(Attention):
        """Half of the positions; what is relative to a query is shifted to the keys."""

        def __init__(self):
            super().__init__(core=self.shifted)

        def forward(self, x):
            return super().forward(x[:, : x.shape[1] // 2])

        def shifted(self, q, k, v):
            _, heads, n, _ = q.shape
            distances = torch.arange(2 * n - 1)[:, None] * torch.ones(HEAD_DIM) / math.log(n)
            relative = nn.functional.pad(q @ distances.T, (1, 0)).reshape(-1, heads, 2 * n, n)
            relative = relative[:, :, 1:].reshape(-1, heads, n, 2 * n - 1)[..., :n]
            return (q @ k.mT + relative).softmax(-1) @ v

    model, x = Shifted(), example(1, 8)
    program = fxslim.capture(model, example(2, 8))
    torch.testing.assert_close(program(x), model(x))


def test_only_sizes_that_occur_twice_are_tied():
    """A bound of one length is no reason to leave the batches apart."""

    class Bounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.randn(50, 32))
            self.inner, self.cross = (nn.MultiheadAttention(32, 4) for _ in range(2))

        def forward(self, source, target):
            source = (source + self.positions[: source.shape[1]]).transpose(0, 1)
            target = (target + self.positions[: target.shape[1]]).transpose(0, 1)
            target = target + self.inner(target, target, target, need_weights=False)[0]
            return self.cross(target, source, source)[0]

    program = fxslim.capture(Bounded(), (torch.randn(2, 9, 32), torch.randn(2, 6, 32)))
    assert [site.prunable for site in fxslim.find_attention(program)] == [True, True]


def test_inputs_whose_batches_must_agree_get_one_symbol():
    """Falcon's ALiBi reshapes by -1 with another input's batch: (4·a) / b is 4 only if a is b."""
    model, inputs = build("falcon:alibi", "sdpa")
    program = fxslim.capture(model, inputs)
    ids, mask = (n.meta["val"] for n in program.graph.nodes if n.op == "placeholder")
    assert ids.shape[0].node.expr == mask.shape[0].node.expr
    assert all(site.prunable for site in fxslim.find_attention(program))


# ----------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("example_inputs", ["one tensor twice", "a weight", "a buffer"])
def test_inputs_that_are_one_tensor_stay_two(example_inputs):
    class Two(Attention):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(example())
            self.register_buffer("buffer", example())

        def forward(self, x, y):
            q, _, _ = self.heads(x + self.weight + self.buffer)
            _, k, v = self.heads(y)
            return self.o(merge(self.core(q, k, v)))

    model, x, y = Two(), example(), example()
    given = {
        "one tensor twice": (x, x),
        "a weight": (x, model.weight),
        "a buffer": (model.buffer, x),
    }
    program = fxslim.capture(model, given[example_inputs], dynamic=False)
    torch.testing.assert_close(program(x, y), model(x, y))
    (site,) = fxslim.find_attention(program)
    assert (site.prunable, site.is_cross) == (True, True)


def test_no_weight_is_copied():
    model = Residual(a=Attention(), b=Attention())
    program = fxslim.capture(model, example())
    ours, theirs = dict(program.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in theirs)


def test_tied_parameters_have_the_models_first_name():
    model = Residual(first=Attention(), second=Attention())
    model.layers.second.q.weight = model.layers.first.q.weight
    program = fxslim.capture(model, example())
    assert program.layers.first.q.weight is model.layers.first.q.weight
    assert set(dict(program.named_parameters())) == set(dict(model.named_parameters()))
    places = [n for n in program.graph.nodes if n.op == "get_attr" and "q.weight" in n.target]
    assert {node.target for node in places} == {"layers.first.q.weight"}


def test_the_model_is_left_as_it_was():
    model = Residual(a=Attention(), b=Attention()).train()
    model.layers.a.k.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    kinds, attributes = [type(m) for m in model.modules()], set(vars(model))
    program = fxslim.capture(model, example())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert ([type(m) for m in model.modules()], set(vars(model))) == (kinds, attributes)
    assert model.training
    assert program.training
    assert not program.layers.a.k.weight.requires_grad


def test_a_transformers_model_is_called_without_its_cache():
    model, inputs = build("gpt2")
    program = fxslim.capture(model, inputs)
    assert notes(program)[0] == (
        "called with use_cache=False: cached keys and values would be graph outputs"
    )
    assert set(program(**inputs)) == {"logits"}
    assert isinstance(program(**inputs), transformers.utils.ModelOutput)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("name", "other", "captured"),
    [
        ("offset", torch.ones(1), "None"),
        ("scale", 2.0, "0.5"),
        ("negative", True, "False"),
        ("mode", "twice", "'once'"),
    ],
)
def test_another_value_than_the_examples_is_refused(name, other, captured):
    class Options(Attention):
        def forward(self, x, offset=None, scale=1.0, negative=False, mode="once"):
            y = super().forward(x) * scale * (2 if mode == "twice" else 1)
            y = y if offset is None else y + offset
            return -y if negative else y

    model, x = Options(), example()
    given = {"x": x, "offset": None, "scale": 0.5, "negative": False, "mode": "once"}
    slim = fxslim.compile(model, 0.5, given)
    slim(**given)
    said = f"input '{name}' has another value than the program was captured for ({captured})"
    with pytest.raises(AssertionError, match=re.escape(said)):
        slim(**given | {name: other})


@pytest.mark.parametrize("dynamic", [True, False])
def test_arguments_may_be_handed_on_without_a_name(dynamic):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, scale=1.0, **kwargs):
            return self.attention(kwargs["x"]) * scale + kwargs["offset"] * kwargs["times"]

    model = Wrapped()
    inputs = {"times": 2, "offset": example(), "scale": 0.5, "x": example()}
    program = fxslim.capture(model, inputs, dynamic=dynamic)
    assert notes(program) == (
        "batch and sequence lengths are symbolic"
        if dynamic
        else "shapes fixed to the example's, as asked",
    )
    torch.testing.assert_close(program(**inputs), model(**inputs))
    (site,) = fxslim.find_attention(program)
    assert site.prunable


def test_a_cache_is_switched_off_where_the_argument_is_only_handed_on():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.inputs = build("gpt2")
            self.config = self.model.config
            self.config.use_cache = True

        def forward(self, input_ids, **kwargs):
            return self.model(input_ids, **kwargs)

    model = Wrapped()
    program = fxslim.capture(model, model.inputs)
    assert notes(program)[0].startswith("called with use_cache=False")
    assert set(program(**model.inputs)) == {"logits"}


def test_a_model_on_the_meta_device_is_captured():
    with torch.device("meta"):
        model, x = Attention(), example()
    program = fxslim.capture(model, x)
    assert all(parameter.is_meta for parameter in program.parameters())
    assert [site.num_heads for site in fxslim.find_attention(program)] == [HEADS]


def test_the_graph_is_functional_and_has_shapes():
    class InPlace(Attention):
        def forward(self, x):
            y = x.clone()
            y += 1
            return super().forward(y).relu_()

    model, x = InPlace(), example()
    program = fxslim.capture(model, x)
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert not any(n.target._schema.is_mutable for n in calls if hasattr(n.target, "_schema"))
    assert all("val" in n.meta for n in calls if isinstance(n.target, torch._ops.OpOverload))
    torch.testing.assert_close(program(x), model(x))


def test_regions_without_gradients_are_inlined():
    class Frozen(Attention):
        def forward(self, x):
            with torch.no_grad():
                x = x * 2
            with torch.autocast("cpu", enabled=False):
                return super().forward(x)

    model, x = Frozen(), example()
    program = fxslim.capture(model, x)
    targets = {type(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not any(issubclass(t, torch._ops.HigherOrderOperator) for t in targets)
    torch.testing.assert_close(program(x), model(x))


def test_regions_without_gradients_give_none():
    class Frozen(Attention):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            with torch.no_grad():
                frozen = self.frozen(x)
            return super().forward(x) * frozen + self.frozen(x)

    model, x = Frozen(), example()
    program = fxslim.capture(model, x)
    gradients = [
        torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (program, model)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------------------- graphs as the model


@pytest.mark.parametrize("core", ["sdpa", "softmax"])
def test_a_symbolic_trace_is_a_model(core):
    model = Attention() if core == "sdpa" else Attention(core=softmax_core)
    traced, x = fx.symbolic_trace(model), example(2, 9)
    code = traced.code
    program = fxslim.capture(traced, example())
    torch.testing.assert_close(program(x), model(x))
    assert program.q.weight is model.q.weight
    assert traced.code == code
    (site,) = fxslim.find_attention(program)
    assert (site.num_heads, site.head_dim, site.prunable) == (HEADS, HEAD_DIM, True)


def test_an_exported_program_is_a_model():
    model, x, other = Attention(), example(), example(2, 9)
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    program = fxslim.capture(exported, x)
    assert notes(program) == ("batch and sequence lengths are symbolic",)
    torch.testing.assert_close(program(other), model(other))
    (site,) = fxslim.find_attention(program)
    assert (site.num_heads, site.query[0].weight) == (HEADS, "q.weight")


def test_a_program_is_a_model():
    program, x = fxslim.capture(Attention(), example()), example(2, 7)
    again = fxslim.capture(program, example())
    assert again is not program
    torch.testing.assert_close(again(x), program(x))


# ----------------------------------------------------------------------------- what PyTorch refuses


def test_pytorchs_reason_is_quoted():
    class Unaligned(Attention):
        def forward(self, x):
            return super().forward(x) if x.data_ptr() % 8 == 0 else x

    with pytest.raises(fxslim.CaptureError) as caught:
        fxslim.capture(Unaligned(), example())
    said = str(caught.value)
    assert said.startswith(
        "torch.export could not capture Unaligned.\n"
        "PyTorch said (RuntimeError):\n"
        "    Cannot access data pointer of Tensor"
    )
    assert said.splitlines()[-1].startswith("Try: other example_inputs (batch of 2 or more")
    assert type(caught.value.__cause__).__name__ == "RuntimeError"


@dataclasses.dataclass
class Inner:
    """What the model's result holds beside the hidden states."""

    half: torch.Tensor
    name: str = "inner"


@dataclasses.dataclass
class Result:
    """A container that `torch.export` does not know."""

    hidden: torch.Tensor
    inner: Inner | None = None


def test_dataclasses_that_a_model_returns_are_registered():
    class Returns(Attention):
        def forward(self, x):
            y = super().forward(x)
            return Result(y, Inner(y / 2))

    program = fxslim.capture(model := Returns(), x := example())
    assert [note.split(",")[0] for note in notes(program)[:2]] == [
        "registered Result",
        "registered Inner",
    ]
    slim = fxslim.compile(program, 0.5)
    got = slim(x)
    assert (type(got), type(got.inner), got.inner.name) == (Result, Inner, "inner")
    torch.testing.assert_close(got.inner.half, got.hidden / 2)
    (site,) = slim.meta["fxslim"].sites
    expected = without_heads(model, [site], slim.meta["fxslim"].plan.kept)(x)
    torch.testing.assert_close(got.hidden, expected.hidden)


def test_an_operator_without_a_row_is_taken_apart():
    class Composite(Attention):
        def forward(self, x):
            q, k, v = (split(linear(x)) for linear in (self.q, self.k, self.v))
            scores = torch.divide(q @ k.mT, 2.0)
            return self.o(torch.hstack([merge(scores.softmax(-1) @ v)]))

    program = fxslim.capture(Composite(), example())
    names = {graph.operator_name(node) for node in program.graph.nodes}
    assert {"linear", "matmul", "softmax", "cat", "div"} <= names
    assert not names & {"divide", "hstack"}
    assert all(site.prunable for site in fxslim.find_attention(program))


class WritesInPlace(Attention):
    """Rotates keys in a buffer of its own, as models that write in place do."""

    def forward(self, x):
        buffer = torch.zeros_like(x)
        buffer.copy_(x * 2)
        buffer.copy_(x.double())
        return super().forward(x + buffer)


def test_values_written_over_others_have_gradients():
    torch.manual_seed(0)
    model, x = WritesInPlace(), example()
    program = fxslim.capture(model, x)
    assert "aten.copy" not in str(program.graph)
    given = x.clone().requires_grad_()
    program(given).sum().backward()
    expected = x.clone().requires_grad_()
    model(expected).sum().backward()
    torch.testing.assert_close(given.grad, expected.grad)


@pytest.mark.parametrize("way", ["sum", "shifted", "logarithm"])
def test_a_softmax_that_is_spelt_out_is_written_as_one(way):
    def probabilities(x):
        if way == "logarithm":
            return torch.exp(x - torch.logsumexp(x, dim=-1, keepdim=True))
        y = torch.exp(x - x.amax(-1, keepdim=True) if way == "shifted" else x)
        return y / y.sum(-1, keepdim=True)

    def core(q, k, v):
        return probabilities(q @ k.mT) @ v

    model, x = Residual(a=Attention(core=core)), example()
    program = fxslim.capture(model, x)
    torch.testing.assert_close(program(x), model(x))
    (site,) = fxslim.find_attention(program)
    assert (site.prunable, site.cores) == (True, ("softmax",))
    assert fxslim.compile(program, 0.5).meta["fxslim"].max_difference < 1e-6


@pytest.mark.parametrize("way", ["epsilon", "other dimension", "twice", "integers"])
def test_what_is_nearly_a_softmax_stays_what_it_is(way):
    class Nearly(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(6, 6)

        def forward(self, x):
            if way == "integers":
                y = torch.exp(self.up(x).round().long())
                return y / y.sum(-1, keepdim=True)
            y = torch.exp(self.up(x))
            if way == "epsilon":
                return y / (y.sum(-1, keepdim=True) + 0.1)
            if way == "other dimension":
                return y / y.sum(1)[:, None]
            return torch.exp(2 * x - torch.logsumexp(x, -1, keepdim=True))

    model, x = Nearly(), example()
    program = fxslim.capture(model, x)
    torch.testing.assert_close(program(x), model(x))
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.softmax.int)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda y: 2 * y, "the program's outputs differ from the model's by .* traced, the"),
        (lambda y: (y, y), "the program returns 2 tensors, the model 1: traced, the"),
    ],
)
def test_a_model_that_does_something_else_when_it_is_traced_is_told_from_its_program(other, told):
    class Other(Attention):
        def forward(self, x):
            y = super().forward(x)
            return other(y) if torch.compiler.is_compiling() else y

    with pytest.warns(UserWarning, match=told):
        fxslim.capture(Other(), example())


@pytest.mark.filterwarnings("ignore:fxslim.capture. the model branches on values:UserWarning")
@pytest.mark.parametrize("seed", range(3))
def test_the_side_of_a_branch_is_that_of_what_the_weights_make_of_the_example(seed):
    class Branching(Attention):
        def forward(self, x):
            y = super().forward(x)
            return y if y.sum() < 1e6 else 2 * y

    torch.manual_seed(seed)
    model, x = Branching(), example()
    torch.testing.assert_close(fxslim.capture(model, x)(x), model(x))
