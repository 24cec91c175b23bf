"""Partial capture: what exports is pruned where it is, in a copy of the user's own model."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fxslim
from tests.models import Attention, Residual, example
from tests.zoo.reference import call_of, compare, without_heads

pytestmark = pytest.mark.filterwarnings("ignore:fxslim. .* does not export as a whole:UserWarning")


class Tower(Residual):
    """Two attentions, and an attribute that its model reads."""

    def __init__(self):
        super().__init__(a=Attention(), b=Attention())
        self.scale = 0.5


class Branching(nn.Module):
    """A model that looks at its values, so that it does not export, around a tower that does."""

    def __init__(self, tower):
        super().__init__()
        self.tower, self.head = tower, nn.Linear(6, 6)

    def forward(self, x):
        y = self.tower(x) * getattr(self.tower, "scale", 1.0)
        return {"y": self.head(y) if y.sum() < 1e6 else y}


@pytest.fixture
def model():
    return Branching(Tower())


@pytest.fixture
def slim(model):
    return fxslim.compile(model, 0.5, example())


def assert_is_without_heads(slim, model, batch=3, length=5):
    report, call = fxslim.Report.of(slim), call_of((example(batch, length),))
    reference = without_heads(model, report.sites, report.plan.kept)
    assert compare(call.on(reference), call.on(model)).relative > 1e-4
    assert compare(call.on(slim), call.on(reference)).relative < 1e-5


def test_the_largest_submodules_that_export_are_pruned(slim, model):
    assert slim.meta["parts"] == ("tower",)
    names = [site.name for site in fxslim.Report.of(slim).sites]
    assert names == ["tower.layers.a", "tower.layers.b"]
    assert_is_without_heads(slim, model)
    assert_is_without_heads(slim, model, batch=2, length=7)


def test_why_the_whole_was_not_captured_is_said(model):
    said = (
        r"(?s)Branching does not export as a whole; captured in parts: tower\n"
        r"torch.export could not capture Branching.*Could not guard"
    )
    with pytest.warns(UserWarning, match=said):
        fxslim.compile(model, 0.5, example())


def test_the_copy_is_of_the_users_class_and_the_model_is_untouched(model):
    before = copy.deepcopy(model.state_dict())
    slim = fxslim.compile(model, 0.5, example())
    assert type(slim) is Branching
    assert type(model.tower) is Tower
    assert slim.head is model.head
    assert slim.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shapes = {name: p.shape for name, p in slim.named_parameters()}
    narrow = [name for name, p in model.named_parameters() if p.shape != shapes[name]]
    assert "tower.layers.a.q.weight" in narrow or "tower.layers.b.q.weight" in narrow


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "fisher", "random"])
def test_every_criterion_scores_all_parts_together(criterion):
    model = Branching(nn.Sequential(Odd(Attention()), Odd(Attention())))
    calibration = [example() for _ in range(2)]
    slim = fxslim.compile(
        model,
        0.5,
        example(),
        criterion=criterion,
        calibration=calibration,
        loss_fn=lambda output: output["y"].square().sum(),
    )
    assert slim.meta["parts"] == ("tower.0.inner", "tower.1.inner")
    report = fxslim.Report.of(slim)
    assert list(report.scores) == [site.name for site in report.sites]
    assert report.max_difference < 1e-5
    assert_is_without_heads(slim, model)


class Odd(nn.Module):
    """A submodule that does not export either."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.sum() < 1e6 else x


def test_the_steps_alone_take_a_model_with_parts(slim, model):
    again = fxslim.compile(slim, 0.5, example())
    assert sum(map(len, fxslim.Report.of(again).plan.kept.values())) == 2
    sites, masked = fxslim.find_attention(slim), fxslim.insert_head_masks(slim)
    plan = fxslim.plan(fxslim.score(masked, "magnitude"), sites, 0.5)
    assert plan == fxslim.Report.of(fxslim.narrow(slim, plan)).plan
    assert fxslim.verify(fxslim.narrow(slim, plan), masked, plan) < 1e-5
    assert fxslim.verify(fxslim.narrow(slim, plan), masked, plan, inputs=example(2, 7)) < 1e-5
    with pytest.raises(ValueError, match=r"Branching is not what fxslim\.compile returned"):
        fxslim.Report.of(model)


def test_copies_and_pickles_keep_what_the_model_reads(slim):
    x = example()
    for other in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        assert torch.equal(other(x)["y"], slim(x)["y"])
        assert fxslim.Report.of(other).plan == fxslim.Report.of(slim).plan


class Nosy(Branching):
    """Reads what a program of its tower does not have."""

    def forward(self, x):
        assert isinstance(self.tower, Tower)
        return super().forward(x)


def test_a_submodule_whose_model_needs_more_than_its_forward_gives_way_to_its_children():
    model = Nosy(Tower())
    slim = fxslim.compile(model, 0.5, example())
    assert slim.meta["parts"] == ("tower.layers.a", "tower.layers.b")
    assert_is_without_heads(slim, model)


@pytest.mark.filterwarnings("ignore:fxslim.capture. the model branches on values:UserWarning")
def test_where_no_submodule_will_do_the_reason_is_that_of_the_whole():
    for layer in (nn.Linear(6, 6), nn.Linear(7, 6)):
        with pytest.raises(fxslim.CaptureError, match="could not capture Branching"):
            fxslim.compile(Branching(layer), 0.5, example())
