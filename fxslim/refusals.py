"""Refusals: why the heads of a core cannot be told apart, or may not go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from fxslim import graph
from fxslim.analysis import AxisMap, Use
from fxslim.axes import Axis, blocks, leaves
from fxslim.calls import Contraction
from fxslim.follow import closure, summed_axes
from fxslim.operands import Operands
from fxslim.weights import Weights

__all__ = ["ONE_HEAD", "projecting", "why_headless", "why_inseparable"]

ONE_HEAD = "there is one head only, so there is no head axis to cut"
_UNPROJECTED = (
    "its heads are channels of what it is made from: no output projection comes before its context "
    "is added to that"
)


def why_headless(
    axis_map: AxisMap, weights: Weights, parts: Operands, candidates: Iterable[Axis]
) -> str:
    """Why none of `candidates`, the axes that projections bring in, is a head axis."""
    nodes = [*parts.query, *parts.key, *parts.value, parts.node]
    found = (why for n in nodes for dim in axis_map.of(n) for why in blocks(dim))
    unruled = next((why for why in found if why.unruled), None)
    if unruled is not None:
        return f"its heads cannot be followed through {unruled.where}: {unruled.why}"
    if _source(axis_map, weights, parts) & set(leaves(parts.probabilities)) - parts.keys:
        return _UNPROJECTED
    if candidates:
        return "its heads are mixed with each other between the query and the scores"
    return ONE_HEAD


def why_inseparable(
    axis_map: AxisMap, weights: Weights, parts: Operands, heads: set[Axis], side: Iterable[Use]
) -> str:
    """Why none of `heads` may go, whatever else reads them; empty if they may.

    `side` are the uses of operands that join in from the side.
    """
    if not any(heads & axis_map.axes(context) for context in parts.context):
        return "its heads are mixed with each other between the scores and the values"
    source = _source(axis_map, weights, parts)
    added = {
        user
        for user, operand in side
        if source & axis_map.axes(operand) and graph.operator_name(user) != "mul"
    }

    def behind(node: fx.Node) -> Iterable[fx.Node]:
        onward = (user for user in node.users if not heads & summed_axes(axis_map, user, node))
        return (user for user in onward if axis_map.axes(user) & heads)

    after = closure(parts.context, behind).keys() - set(parts.context)  # a mask joins in before
    return _UNPROJECTED if added & after else ""


def projecting(axis_map: AxisMap, weights: Weights, operand: fx.Node) -> Iterator[Contraction]:
    """How the nearest products with a parameter behind `operand` sum over it."""

    def back(node: fx.Node) -> Iterable[fx.Node]:
        return () if axis_map.contractions.get(node) else graph.tensor_inputs(node)

    for node in closure([operand], back):
        for contraction in axis_map.contractions.get(node, ()):
            if weights.is_weight(contraction.operand):
                yield contraction


def _source(axis_map: AxisMap, weights: Weights, parts: Operands) -> set[Axis]:
    """The channels that queries are made from."""
    found = (projecting(axis_map, weights, node) for node in parts.query)
    return {leaf for contractions in found for c in contractions for leaf in leaves(c.dim)}
