"""Repair: what can be made up for is made up for, exactly."""

import copy

import pytest
import torch
from torch import nn

import fxslim
from fxslim.fisher import OutputFisher
from tests.models import HEAD_DIM, WIDTH, Attention, Residual, example, split
from tests.test_matrices import WRITTEN, Written

KEPT = {"sparsity": 0.25}


def double_a_head(attention):
    """Make head 1 attend as head 0 does, to the same values."""
    with torch.no_grad():
        for linear in (attention.q, attention.k, attention.v):
            for tensor in (linear.weight, linear.bias):
                tensor[HEAD_DIM : 2 * HEAD_DIM] = tensor[:HEAD_DIM]
    return attention


def batches(count=6):
    torch.manual_seed(1)
    return [example(4, 7) for _ in range(count)]


def without_head_1(model, *sites):
    """The program, and the same without head 1 at some sites."""
    program = fxslim.capture(model, example())
    kept = {site: [0, 2, 3] for site in sites}
    return program, fxslim.narrow(program, fxslim.PruningPlan(kept, 0.25))


def gap(one, other, inputs=None):
    x = example(2, 9) if inputs is None else inputs
    with torch.no_grad():
        return (one(x) - other(x)).abs().max().item()


def assert_repaired(model, *sites):
    """The doubled head is missed by the slim model, and not by the repaired one."""
    program, slim = without_head_1(model, *sites)
    repaired = fxslim.repair(slim, program, batches())
    assert gap(slim, model) > 1e-2
    assert gap(repaired, model) < 1e-4
    return repaired


def test_a_head_that_another_doubles_is_made_up_for():
    torch.manual_seed(0)
    model = Residual(a=double_a_head(Attention()), b=Attention())
    repaired = assert_repaired(model, "layers.a")
    names = [done.weight for done in fxslim.Report.of(repaired).refitted]
    assert names == ["layers.a.o.weight", "layers.b.o.weight"]
    assert repaired.layers.a.o.weight.shape == (WIDTH, 3 * HEAD_DIM)


@pytest.mark.parametrize("name", WRITTEN)
def test_however_the_output_projection_is_written(name):
    torch.manual_seed(0)
    assert_repaired(double_a_head(Written(*WRITTEN[name])), "attention")


class Autocast(nn.Module):
    """Weights that are cast at every call."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x).float()


@pytest.mark.parametrize("bias", [True, False])
def test_weights_that_are_cast_are_refitted_in_their_own_type(bias):
    torch.manual_seed(0)
    model = Autocast(Residual(a=Attention(bias=bias)))
    program, slim = without_head_1(model, "model.layers.a")
    repaired = fxslim.repair(slim, program, batches(30), biases=True)
    (done,) = fxslim.Report.of(repaired).refitted
    assert done.weight == "model.layers.a.o.weight"
    assert done.after < done.before
    assert gap(repaired, model) < gap(slim, model)
    assert {p.dtype for p in repaired.parameters()} == {torch.float32}
    assert repaired.state_dict().keys() == slim.state_dict().keys()
    changed = "model.layers.a.o.bias"
    if bias:
        assert not torch.equal(repaired.get_parameter(changed), slim.get_parameter(changed))


COMPUTED = {
    "doubled": lambda w: w * 2,
    "halved": lambda w: w * 0.5,
    "standardised": lambda w: w - w.mean(0, keepdim=True),
    "shifted": lambda w: w + torch.full_like(w, 0.1),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_a_weight_that_is_computed_stays_and_that_is_said(how):
    class Computing(Attention):
        def forward(self, x):
            q, k, v = (split(linear(x)) for linear in (self.q, self.k, self.v))
            context = self.core(q, k, v).transpose(1, 2).flatten(2)
            return context @ COMPUTED[how](self.o.weight).T

    program, slim = without_head_1(Computing(), "attention")
    with pytest.warns(UserWarning, match=r"^fxslim.repair: nothing was refitted"):
        repaired = fxslim.repair(slim, program, batches())
    assert gap(repaired, slim) == 0


class Scaled(nn.Module):
    """Flattened rows, a projection with a bias of its own, a scale a channel, a residual."""

    def __init__(self):
        super().__init__()
        self.attention = double_a_head(Attention(bias=True))
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.shift = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        a = self.attention
        q, k, v = (split(linear(x)) for linear in (a.q, a.k, a.v))
        context = a.core(q, k, v).transpose(1, 2).flatten(2)
        rows = a.o(context.flatten(0, 1)).view(x.shape)
        return x + (rows + self.shift) * self.scale


def test_through_what_lies_between_projection_and_residual():
    torch.manual_seed(0)
    assert_repaired(Scaled(), "attention")


class Shared(nn.Module):
    """One attention, used twice."""

    def __init__(self):
        super().__init__()
        self.attention = double_a_head(Attention())

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.attention(x)


def test_a_weight_with_two_uses_is_refitted_to_both():
    torch.manual_seed(0)
    model = Shared()
    program = fxslim.capture(model, example())
    names = [site.name for site in fxslim.find_attention(program)]
    repaired = assert_repaired(model, *names)
    assert len(fxslim.Report.of(repaired).refitted) == 1


class Adapted(nn.Module):
    """A linear layer and a low-rank one beside it (LoRA; Hu et al. 2021)."""

    def __init__(self, linear):
        super().__init__()
        self.linear, (rows, columns) = linear, linear.weight.shape
        self.down, self.up = nn.Linear(columns, 2, bias=False), nn.Linear(2, rows, bias=False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["q", "v", "o"])
def test_what_is_added_to_heads_is_no_residual_stream(name):
    torch.manual_seed(0)
    model = Residual(a=Attention(), b=Attention())
    for attention in (model.layers.a, model.layers.b):
        setattr(attention, name, Adapted(getattr(attention, name)))
    slim = fxslim.compile(model, 0.5, calibration=batches())
    named = {done.weight for done in fxslim.Report.of(slim).refitted}
    own = "o.linear.weight" if name == "o" else "o.weight"
    assert {f"layers.{layer}.{own}" for layer in "ab"} <= named
    assert not any(f".{name}." in weight for weight in named if name != "o")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_switched_off(context):
    torch.manual_seed(0)
    model = Residual(a=Attention(), b=Attention())
    with context():
        slim = fxslim.compile(model, 0.5, calibration=batches())
        assert not torch.is_grad_enabled()
    assert fxslim.Report.of(slim).refitted
    assert all(p.requires_grad and not p.is_inference() for p in slim.parameters())


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x):
        return self.down(self.up(x).relu())


def test_later_layers_make_up_for_what_earlier_ones_lost():
    torch.manual_seed(0)
    model = Residual(a=Attention(), b=FeedForward(), c=Attention())
    program, slim = without_head_1(model, "layers.a")
    repaired = fxslim.repair(slim, program, batches(40))
    done = {r.weight: r for r in fxslim.Report.of(repaired).refitted}
    assert list(done) == ["layers.a.o.weight", "layers.b.down.weight", "layers.c.o.weight"]
    assert all(r.after < r.before for r in done.values())
    assert gap(repaired, model) < gap(slim, model)


def test_nothing_that_came_in_is_changed():
    torch.manual_seed(0)
    model = Residual(a=double_a_head(Attention()), b=Attention())
    program, slim = without_head_1(model, "layers.a")
    before = [copy.deepcopy(m.state_dict()) for m in (model, slim)]
    fxslim.repair(slim, program, batches())
    for state, module in zip(before, (model, slim), strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_a_projection_without_a_bias_keeps_none():
    torch.manual_seed(0)
    model = Residual(a=Attention(bias=False))
    program, slim = without_head_1(model, "layers.a")
    repaired = fxslim.repair(slim, program, batches())
    assert repaired.state_dict().keys() == slim.state_dict().keys()
    (done,) = fxslim.Report.of(repaired).refitted
    assert done.after < done.before


def test_a_bias_that_others_use_stays_as_it_is():
    class Tied(Attention):
        def forward(self, x):
            return super().forward(x) + self.o.bias.tanh() * x

    torch.manual_seed(0)
    model = double_a_head(Tied())
    repaired = assert_repaired(model, "attention")
    assert torch.equal(repaired.o.bias, model.o.bias)


def test_compile_repairs_where_it_is_given_data():
    torch.manual_seed(0)
    model = Residual(a=double_a_head(Attention()), b=double_a_head(Attention()))
    slim = fxslim.compile(model, 0.25, example(), calibration=batches())
    report = fxslim.Report.of(slim)
    assert report.refitted
    assert report.max_difference < 1e-4
    plain = fxslim.compile(model, plan=report.plan, calibration=batches(), repair=False)
    assert not fxslim.Report.of(plain).refitted
    assert gap(slim, model) < gap(plain, model)
    doubles = OutputFisher(compensated=True, dropped=0.0)
    exact = fxslim.compile(model, 0.25, calibration=batches(), criterion=doubles, repair=True)
    assert gap(exact, model) < 1e-4
    named = fxslim.compile(model, 0.25, example(), calibration=batches(), criterion="output_fisher")
    assert not fxslim.Report.of(named).refitted


def test_what_is_missing_is_named():
    model = Residual(a=Attention())
    program, slim = without_head_1(model, "layers.a")
    with pytest.raises(ValueError, match=r"^repair needs calibration batches"):
        fxslim.repair(slim, program, [])
    with pytest.raises(ValueError, match=r"^repair needs calibration batches"):
        fxslim.compile(model, 0.5, example(), repair=True)


OWN = slice(HEAD_DIM, 2 * HEAD_DIM)
"""The rows of head 1."""


def test_a_bias_is_added_where_it_is_asked_for():
    """A head that gives the same everywhere: it reads a channel that is always 1."""
    torch.manual_seed(0)
    attention = Attention(bias=False)
    with torch.no_grad():
        attention.v.weight[:, 0] = 0.0
        attention.v.weight[OWN] = torch.eye(WIDTH)[0]
    model = Residual(a=attention)
    program, slim = without_head_1(model, "layers.a")
    data = [batch.index_fill(-1, torch.tensor(0), 1.0) for batch in batches()]
    plain = fxslim.repair(slim, program, data)
    biased = fxslim.repair(slim, program, data, biases=True)
    names = [set(dict(made.named_parameters())) for made in (slim, plain, biased)]
    assert names[0] == names[1]
    assert names[2] - names[1] == {"layers.a.o.bias"}
    assert len(biased.graph.nodes) == len(slim.graph.nodes) + 1  # the parameter itself
    assert gap(plain, model, data[0]) > 1e-2
    assert gap(biased, model, data[0]) < 1e-4


def test_a_bias_that_is_there_is_fitted_with_its_weight():
    """A head that gives the same everywhere: its values are their bias."""
    torch.manual_seed(0)
    attention = Attention()
    with torch.no_grad():
        attention.v.weight[OWN] = 0.0
    repaired = assert_repaired(Residual(a=attention), "layers.a")
    bias = attention.o.bias + attention.o.weight[:, OWN] @ attention.v.bias[OWN]
    torch.testing.assert_close(repaired.layers.a.o.bias, bias, atol=1e-3, rtol=0)
