"""Prune, and the passes in PyTorch's own pass manager."""

import pytest
import torch
from torch.fx.passes.infra.pass_manager import PassManager

import fxslim
from fxslim.dynamo import trace
from fxslim.locate import locate
from fxslim.passes import InsertHeadMasks, Narrow, Prune
from tests.models import Attention, Residual, example

PLAN = fxslim.PruningPlan({"layers.a": [1, 3]}, 0.5)


def model():
    return Residual(a=Attention()).eval()


def test_it_is_narrow():
    program = fxslim.capture(model(), example())
    result = Prune(PLAN)(program)
    assert result.modified
    assert result.graph_module.code == fxslim.narrow(program, PLAN).code
    assert not Prune(fxslim.PruningPlan({}, 0.0))(program).modified


def test_the_program_is_untouched():
    program = fxslim.capture(model(), example())
    before = fxslim.show(program)
    Prune(PLAN)(program)
    assert fxslim.show(program) == before


def test_a_plan_that_does_not_fit_is_an_error():
    program = fxslim.capture(model(), example())
    with pytest.raises(fxslim.PlanError, match=r"^the plan names site 'layers.b'; the sites are:"):
        Prune(fxslim.PruningPlan({"layers.b": [0]}, 0.75))(program)


@pytest.mark.parametrize("one", [Prune, InsertHeadMasks, Narrow])
def test_in_a_pass_manager_on_an_exported_graph(one):
    dense, x = model(), example()
    program, other = fxslim.capture(dense, x), example(2, 7)
    located = locate(program)
    made = {
        Prune: lambda: Prune(PLAN),
        InsertHeadMasks: lambda: InsertHeadMasks(located),
        Narrow: lambda: Narrow(located.axis_map, {}),
    }[one]()
    result = PassManager([made])(program)
    expected = fxslim.narrow(program, PLAN) if one is Prune else dense
    torch.testing.assert_close(result.graph_module(other), expected(other))


@torch.no_grad()
def test_in_a_pass_manager_on_dynamos_graph():
    dense, x = model(), example()
    found = []

    def backend(graph_module, example_inputs):
        program = trace(graph_module, example_inputs).program
        found.append(PassManager([Prune(PLAN)])(program).graph_module)
        return found[-1]

    torch.compiler.reset()
    slim = torch.compile(dense, backend=backend)
    torch.testing.assert_close(slim(x), fxslim.narrow(fxslim.capture(dense, x), PLAN)(x))
    assert found[0].layers.a.q.weight.shape == (4, 6)
