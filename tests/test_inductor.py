"""The pass for Inductor's hooks, with Inductor on a CPU for real."""

import re

import pytest
import torch
from torch._dynamo.utils import counters

import fxslim
from fxslim.inductor import PrunePass
from tests.models import Attention, Residual, example
from tests.test_imports import python

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # Inductor's own imports
]


def plan_of(*kept):
    return fxslim.PruningPlan({"layers.a": list(kept)}, 1 - len(kept) / 4)


@pytest.fixture
def model():
    torch.compiler.reset()
    return Residual(a=Attention()).eval()


def compiled(model, plan, **options):
    torch.compiler.reset()
    return torch.compile(model, options={"pre_grad_custom_pass": PrunePass(plan), **options})


@torch.no_grad()
def test_inductor_compiles_the_narrow_graph(model):
    slim = compiled(model, plan_of(1, 3))
    expected = fxslim.narrow(fxslim.capture(model, example()), plan_of(1, 3))
    for x in (example(), example(2, 7), example(4, 9)):
        torch.testing.assert_close(slim(x), expected(x))


def test_gradients_of_the_heads_that_go_are_zero(model):
    slim = compiled(model, plan_of(1, 3))
    (gradient,) = torch.autograd.grad(slim(example()).sum(), [model.layers.a.v.weight])
    heads = gradient.reshape(4, 2, 6)
    assert not heads[[0, 2]].any()
    assert heads[[1, 3]].all()


@torch.no_grad()
def test_the_cache_tells_two_plans_apart(model, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, found = example(), []
    program = fxslim.capture(model, x)
    for kept in ((1, 3), (0, 2), (1, 3)):
        counters.clear()
        got = compiled(model, plan_of(*kept))(x)
        torch.testing.assert_close(got, fxslim.narrow(program, plan_of(*kept))(x))
        found.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert found == [0, 0, 1]


def test_the_name_of_a_pass_is_that_of_its_plan_in_every_process():
    make = "PrunePass(fxslim.PruningPlan({'layers.a': [1, 3]}, 0.5)).uuid()"
    done = python(f"import fxslim; from fxslim.inductor import PrunePass; print({make})")
    assert done.stdout.strip() == PrunePass(plan_of(1, 3)).uuid(), done.stderr
    assert PrunePass(plan_of(0, 2)).uuid() != PrunePass(plan_of(1, 3)).uuid()


def test_a_plan_that_does_not_name_the_site_is_an_error(model):
    slim = compiled(model, fxslim.PruningPlan({"layers.b": [0]}, 0.75))
    with pytest.raises(Exception, match=re.escape("the plan does not say what 'layers.a' keeps")):
        slim(example())
