"""Walks: the values of a program at a place of its graph, batch by batch."""

import torch
from torch import nn

import fxslim
from fxslim.walk import Walk
from tests.models import Attention, Residual, example


def program_of(model):
    return fxslim.capture(model, example())


def node_at(program, part):
    """The last node whose weight is in that submodule."""
    names = [n for n in program.graph.nodes if n.op == "get_attr" and part in str(n.target)]
    return next(iter(names[-1].users))


def test_stretch_after_stretch_gives_what_the_model_gives():
    model = Residual(a=Attention(), b=Attention())
    program, batches = program_of(model), [example(), example(2, 7)]
    walk = Walk(program, [((x,), {}) for x in batches])
    for part in ("a.q", "a.o", "b.v", "b.o"):
        walk.advance(node_at(program, part))
    output = next(node for node in program.graph.nodes if node.op == "output")
    walk.advance(output)
    for value, x in zip(walk.values(output.all_input_nodes[0]), batches, strict=True):
        torch.testing.assert_close(value, model(x))


def test_only_what_is_still_needed_is_held():
    program = program_of(Residual(a=Attention(), b=Attention()))
    pinned = node_at(program, "a.o")
    walk = Walk(program, [((example(),), {})], [pinned])
    walk.advance(node_at(program, "b.o"))
    (held,) = walk._values
    assert pinned in held
    assert len([v for v in held.values() if isinstance(v, torch.Tensor)]) == 3
    walk.release(pinned)
    assert pinned not in held


def test_a_weight_that_changes_is_seen_at_once():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    program = program_of(model)
    first, second = (node for node in program.graph.nodes if "linear" in node.name)
    x = example()
    walk = Walk(program, [((x,), {})])
    walk.advance(second)
    with torch.no_grad():
        model[1].weight.zero_()
    torch.testing.assert_close(walk.result(second, 0), model[1](model[0](x)))
    with torch.no_grad():
        model[0].weight.zero_()
    walk.restart()
    walk.advance(second)
    torch.testing.assert_close(walk.value(first, 0), model[0](x))


def test_keywords_come_in_any_order():
    class Difference(nn.Linear):
        def forward(self, *, one, other):
            return super().forward(one) - other

    model, inputs = Difference(6, 6), {"one": example(), "other": example()}
    program = fxslim.capture(model, inputs)
    walk = Walk(program, [((), dict(reversed(inputs.items())))])
    output = next(node for node in program.graph.nodes if node.op == "output")
    walk.advance(output)
    torch.testing.assert_close(walk.value(output.all_input_nodes[0], 0), model(**inputs))
