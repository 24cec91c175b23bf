"""Prune, and the passes in PyTorch's own pass manager."""

import pytest
import torch
from torch.fx.passes.infra.pass_manager import PassManager

import fxslim
from fxslim.dynamo import trace
from fxslim.keeping import keep_of
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


def made(one, program):
    """A pass for this program."""
    located = locate(program)
    return {
        Prune: lambda: Prune(PLAN),
        InsertHeadMasks: lambda: InsertHeadMasks(located),
        Narrow: lambda: Narrow(located.axis_map, keep_of(located, PLAN)),
    }[one]()


EACH = pytest.mark.parametrize("one", [Prune, InsertHeadMasks, Narrow])


@EACH
def test_in_a_pass_manager_on_an_exported_graph(one):
    dense, x = model(), example()
    program, other = fxslim.capture(dense, x), example(2, 7)
    result = PassManager([made(one, program)])(program)
    expected = dense if one is InsertHeadMasks else fxslim.narrow(program, PLAN)
    torch.testing.assert_close(result.graph_module(other), expected(other))


@EACH
@torch.no_grad()
def test_in_a_pass_manager_on_dynamos_graph(one):
    dense, x = model(), example()
    found = []

    def backend(graph_module, example_inputs):
        program = trace(graph_module, example_inputs).program
        found.append(PassManager([made(one, program)])(program).graph_module)
        return found[-1]

    torch.compiler.reset()
    run = torch.compile(dense, backend=backend)
    masked = one is InsertHeadMasks
    expected = dense if masked else fxslim.narrow(fxslim.capture(dense, x), PLAN)
    torch.testing.assert_close(run(x), expected(x))
    assert found[0].layers.a.q.weight.shape == (8 if masked else 4, 6)
