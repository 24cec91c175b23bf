"""What knows fx: generic sizes of symbolic lengths, arguments by name, tensors at dotted paths."""

import pytest
import sympy
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxslim import graph

ATEN = torch.ops.aten


def symbolic_shapes(function, *shape):
    """The symbolic shape of a function's result, all dimensions of its input being symbolic."""

    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    sizes = (dict.fromkeys(range(len(shape)), Dim.AUTO),)
    exported = torch.export.export(Model(), (torch.randn(shape),), dynamic_shapes=sizes)
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes}
    (result,) = exported.graph.output_node().args[0]
    return values["x"].shape, values[result.name].shape


def generic(sizes):
    return [graph.generic_size(n) for n in sizes]


def test_a_number_is_itself():
    assert generic([0, 1, 7]) == [0, 1, 7]


def test_sizes_that_are_equal_everywhere_are_equal():
    (a, b), (product,) = symbolic_shapes(lambda x: x.flatten(), 6, 10)
    (_, _), (total, same) = symbolic_shapes(lambda x: torch.cat([x, x, x]), 6, 10)
    assert graph.generic_size(product) == graph.generic_size(a) * graph.generic_size(b)
    assert graph.generic_size(total) % 3 == 0
    assert graph.is_symbolic(graph.generic_size(same))


def test_sizes_that_are_equal_in_the_example_only_are_not():
    (a, b), _ = symbolic_shapes(lambda x: x + 1, 6, 6)
    assert graph.generic_size(a) != graph.generic_size(b)


@pytest.mark.parametrize("divisor", [2, 3, 4, 7, 8, 16, 64, 12, 14])
def test_no_length_is_divisible_by_chance(divisor):
    (a, _), (half,) = symbolic_shapes(lambda x: x[: x.shape[0] // divisor, 0], 64 * divisor, 3)
    assert graph.generic_size(a) % divisor
    assert graph.generic_size(half) * divisor != graph.generic_size(a)


@pytest.mark.parametrize("divisor", [2, 3, 4, 7, 8, 16, 64, 12, 14])
def test_that_a_length_is_divisible_relates_it_to_no_other(divisor):
    symbol = sympy.Symbol("s0", integer=True, positive=True)
    assert graph.holds(sympy.Eq(sympy.Mod(symbol, divisor), 0, evaluate=False))


def test_a_size_is_symbolic_however_it_is_made():
    (a, _), (half,) = symbolic_shapes(lambda x: x[: x.shape[0] // 2, 0], 8, 3)
    assert graph.is_symbolic(graph.generic_size(a))
    assert graph.is_symbolic(graph.generic_size(half))
    assert not graph.is_symbolic(2**31)


def test_a_quotient_of_symbols_may_be_a_number():
    s = sympy.Symbol("s0", integer=True, positive=True)
    assert graph._evaluate((4 * s * (s + 1)) // (s * (s + 1))) == 4
    assert graph.is_symbolic(graph._evaluate(sympy.Mod(s, 4)))
    other = sympy.Symbol("s1", integer=True, positive=True)
    assert graph.is_symbolic(graph._evaluate((512 * other) // s))


def test_a_symbol_that_export_fixed_is_fixed():
    (a, b), _ = symbolic_shapes(lambda x: x + torch.ones(3), 8, 3)
    assert (graph.fixed_size(a), graph.fixed_size(b), graph.fixed_size(5)) == (None, 3, 5)


def test_an_equation_that_the_example_alone_satisfies_does_not_hold():
    a, b = sympy.symbols("a b", integer=True, positive=True)
    assert graph.holds(sympy.Eq(2 * a, a + a, evaluate=False))
    assert graph.holds(sympy.Ne(a, b))
    assert not graph.holds(sympy.Eq(4 * a, 4 * b, evaluate=False))


def call(target, *args, **kwargs):
    """A node that calls `target`."""
    g = fx.Graph()
    places = [g.placeholder(f"x{i}") for i in range(3)]
    return g.call_function(target, (places[0], *args), kwargs)


def test_arguments_have_the_schemas_names_and_defaults():
    node = call(ATEN.slice.Tensor, 1, end=5)
    named = graph.arguments(node)
    assert list(named) == ["self", "dim", "start", "end", "step"]
    assert [named[name] for name in list(named)[1:]] == [1, None, 5, 1]


@pytest.mark.parametrize(("name", "value"), [("dim", 2), ("end", 7), ("step", 3)])
def test_an_argument_is_set_wherever_it_was(name, value):
    node = call(ATEN.slice.Tensor, 1, 0, end=5)
    graph.set_argument(node, name, value)
    assert graph.arguments(node) == graph.arguments(node) | {name: value}
    assert graph.arguments(node)["start"] == 0


@pytest.mark.parametrize(
    ("target", "name"),
    [(ATEN.add.Tensor, "add"), (torch.ops.prims.add.default, "prims::add"), (torch.neg, "neg")],
)
def test_operators_are_named_as_the_table_spells_them(target, name):
    assert graph.operator_name(call(target)) == name


def test_a_node_is_named_with_the_module_it_comes_from():
    node = call(ATEN.relu.default)
    assert graph.user_name(node) == "relu (relu_default)"
    node.meta["nn_module_stack"] = {"": ("", nn.Module), "a": ("layers.0", nn.Module)}
    assert graph.user_name(node) == "relu (relu_default in layers.0)"
    assert graph.module_path(node) == "layers.0"


def test_tensors_are_read_and_put_at_dotted_paths():
    model = nn.Sequential(nn.Linear(2, 3))
    model[0].register_buffer("count", torch.zeros(1))
    weight, count = nn.Parameter(torch.ones(1, 2)), torch.ones(4)
    graph.set_attribute(model, "0.weight", weight)
    graph.set_attribute(model, "0.count", count)
    assert graph.attribute(model, "0.weight") is weight
    assert dict(model.named_parameters())["0.weight"] is weight
    assert dict(model.named_buffers())["0.count"] is count


def test_shapes_of_fake_tensors_are_generic():
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fake = mode.from_tensor(torch.randn(2, 3), static_shapes=True)
    assert graph.shape(fake) == (2, 3)
