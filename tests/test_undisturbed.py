"""What a model is looked at with leaves it as it was."""

import copy

import pytest
import torch
from torch import nn

import fxslim
from fxslim.undisturbed import buffers_kept, in_eval_mode
from tests.models import WIDTH, Attention, Residual, example


class Counting(nn.Module):
    """Writes into a buffer whenever it is called."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.attention(x) * self.calls.sign()


class Learning(nn.Module):
    """Dropout as modules and functions have it, and batch norm."""

    def __init__(self):
        super().__init__()
        self.attention, self.dropout = Attention(), nn.Dropout(0.5)
        self.norm, self.channels = nn.BatchNorm1d(WIDTH), nn.Dropout1d(0.3)

    def forward(self, x):
        y = self.norm(self.attention(x).transpose(1, 2)).transpose(1, 2)
        return self.channels(nn.functional.dropout(self.dropout(y), 0.5, self.training))


def test_modes_are_put_back_one_by_one():
    model = Residual(a=Learning(), b=Attention()).train()
    model.layers.a.norm.eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), in_eval_mode(model):
        model(example()[..., :-1])  # too narrow
    with in_eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_a_modules_own_eval_is_not_called():
    class Merging(Attention):
        def train(self, mode=True):
            raise AssertionError("it merges weights")

    fxslim.compile(Merging(), 0.5, example())


def test_buffers_are_put_back_in_place():
    model = Counting()
    buffer = model.calls
    with buffers_kept(model, model):
        model(example())
        assert model.calls == 1
    assert model.calls == 0
    assert model.calls is buffer


@pytest.mark.parametrize("model", [Counting().eval(), Learning().train()], ids=["counter", "norm"])
def test_no_step_changes_the_models_buffers(model):
    x, batches = example(), [example(4, 7) for _ in range(3)]
    before = copy.deepcopy(model.state_dict())
    fxslim.compile(model, 0.5, x, calibration=batches)
    program = fxslim.capture(model, x)
    fxslim.cost(program, "latency", seconds=0.01)
    fxslim.score(fxslim.insert_head_masks(program), "leave_one_out", batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_in_training_is_captured_as_it_is_in_eval_mode():
    model, x = Learning().train(), example()
    model(x)  # statistics of its own
    program = fxslim.capture(model, x)
    slim = fxslim.compile(model, 0.5, x, calibration=[example(4, 7) for _ in range(3)])
    assert program.training
    assert slim.training
    assert model.dropout.training
    masked = fxslim.insert_head_masks(program)
    narrow = fxslim.narrow(program, fxslim.Report.of(slim).plan)
    assert fxslim.verify(narrow, masked, fxslim.Report.of(slim).plan) < 1e-5
    expected = copy.deepcopy(model).eval()(x)
    for mode in (True, False):
        torch.testing.assert_close(program.train(mode)(x), expected)
        assert torch.equal(slim.train(mode)(x), slim(x))
