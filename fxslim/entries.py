"""Parameters behind constants: which one a product's weight is, and where in it each entry lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxslim.follow import closure
from fxslim.matrices import Product, as_matrix
from fxslim.walk import Walk

__all__ = ["bias_of", "matrix_of", "readers"]


def matrix_of(walk: Walk, product: Product, node: fx.Node) -> tuple[str, torch.Tensor] | None:
    """The one parameter behind a product's weight, and where in it each entry of the matrix is."""
    operand = node.all_input_nodes[product.weight]
    found = _entries(walk, operand)
    if found is None:
        return None
    parameter, places = found
    if bool((places.flatten().sort().values.diff() == 0).any()):
        return None
    return str(parameter.target), as_matrix(places, product.weight_features).mT


def bias_of(walk: Walk, product: Product, node: fx.Node) -> str | None:
    """The parameter that the product adds, one number an output."""
    inputs = node.all_input_nodes
    others = [n for n in inputs if n not in (inputs[product.operand], inputs[product.weight])]
    found = _entries(walk, others[0]) if len(others) == 1 else None
    if found is None:
        return None
    parameter, places = found
    outputs = tuple(node.meta["val"].shape[d] for d in product.outputs)
    whole = torch.equal(places, torch.arange(places.numel(), device=places.device))
    return str(parameter.target) if whole and tuple(places.shape) == outputs else None


def _entries(walk: Walk, constant: fx.Node) -> tuple[fx.Node, torch.Tensor] | None:
    """The one parameter behind a value, and where in it each entry lies; None if it is computed."""
    parameter = _parameter_behind(walk, constant)
    numbers = None if parameter is None else _numbers(walk, parameter, constant)
    if parameter is None or numbers is None:
        return None
    values, actual = walk.constant(parameter), walk.constant(constant)
    inside = (numbers == numbers.round()) & (numbers >= 0) & (numbers < values.numel())
    if numbers.shape != actual.shape or not inside.all():
        return None
    places = numbers.long()
    same = torch.equal(values.flatten()[places].to(actual.dtype), actual)
    return (parameter, places) if same else None


def _parameter_behind(walk: Walk, constant: fx.Node) -> fx.Node | None:
    """The only parameter that a constant is made from; None if there are more, or none."""
    if not walk.is_constant(constant):
        return None
    read = [n for n in _before(walk, constant) if n.op == "get_attr"]
    parameters = [n for n in read if isinstance(walk.constant(n), nn.Parameter)]
    return parameters[0] if len(parameters) == 1 else None


def _numbers(walk: Walk, parameter: fx.Node, constant: fx.Node) -> torch.Tensor | None:
    """What the operators behind `constant` make of the numbers of the parameter's entries.

    An operator that gives them back in another type casts, and entries stay where they are; one
    that takes floating-point numbers beside them computes.
    """
    values = walk.constant(parameter)
    numbers = torch.arange(values.numel(), dtype=torch.float64, device=values.device)
    moved: dict[fx.Node, Any] = {parameter: numbers.view(values.shape)}
    for node in (n for n in _before(walk, constant) if n.op == "call_function"):
        source = next((n for n in node.all_input_nodes if n in moved), None)
        if source is None:
            continue
        if any(_is_floating(walk.constant(n)) for n in node.all_input_nodes if n not in moved):
            return None
        value = walk.constant(node, moved)
        cast = isinstance(value, torch.Tensor) and value.dtype != numbers.dtype
        moved[node] = moved[source] if cast else value
    found = moved[constant]
    return found if isinstance(found, torch.Tensor) else None


def _before(walk: Walk, constant: fx.Node) -> list[fx.Node]:
    """A node and all that it is made from, in the order of the graph."""
    before = closure([constant], lambda n: n.all_input_nodes)
    return sorted(before, key=walk.place.__getitem__)


def _is_floating(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def readers(walk: Walk) -> dict[int, set[fx.Node]]:
    """For each tensor by its id, the nodes that it reaches through constants alone."""
    found: dict[int, set[fx.Node]] = {}
    for node in walk.nodes:
        if node.op == "get_attr":
            reached = closure([node], lambda n: n.users if walk.is_constant(n) else ())
            ends = {n for n in reached if not walk.is_constant(n)}
            found.setdefault(id(walk.constant(node)), set()).update(ends)
    return found
