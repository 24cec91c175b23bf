"""Walks over the graph that follow axes, whatever operators lie between."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from fxslim import graph
from fxslim.analysis import AxisMap
from fxslim.axes import Axis, members
from fxslim.calls import Contraction

__all__ = ["closure", "operands_with", "summed_axes", "sums"]


def closure(
    start: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]
) -> dict[fx.Node, None]:
    """All nodes that `step` leads to from `start`, nearest first."""
    seen: dict[fx.Node, None] = dict.fromkeys(start)
    queue = list(seen)
    for node in queue:
        for other in step(node):
            if other not in seen:
                seen[other] = None
                queue.append(other)
    return seen


def operands_with(axis_map: AxisMap, node: fx.Node, axes: set[Axis]) -> Iterable[fx.Node]:
    """The operands from which `node` has `axes`: not those that it sums over them."""
    inputs = graph.tensor_inputs(node)
    return (n for n in inputs if (axis_map.axes(n) - summed_axes(axis_map, node, n)) & axes)


def summed_axes(axis_map: AxisMap, user: fx.Node, operand: fx.Node) -> set[Axis]:
    """The axes of `operand` that `user` sums over."""
    contractions = axis_map.contractions.get(user, ())
    return {axis for c in contractions if c.operand is operand for axis in members(c.dim)}


def sums(axis_map: AxisMap, user: fx.Node, operand: fx.Node, axes: set[Axis]) -> list[Contraction]:
    """The contractions in which `user` sums over `axes` of `operand`; without any, over a unit."""
    return [
        c
        for c in axis_map.contractions.get(user, ())
        if c.operand is operand and (set(members(c.dim)) & axes if axes else not c.dim)
    ]
