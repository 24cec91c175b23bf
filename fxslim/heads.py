"""Heads: which leaves of the probabilities are head axes."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from torch import fx

from fxslim.analysis import AxisMap
from fxslim.axes import Axis, leaves
from fxslim.calls import Contraction
from fxslim.operands import Operands
from fxslim.weights import Weights

__all__ = ["head_dim_of", "heads_brought_in", "heads_ended", "heads_selected"]

Heads = tuple[Axis, ...]


def heads_brought_in(axis_map: AxisMap, weights: Weights, parts: Operands) -> set[Axis]:
    """The leaves that a projection brings in, or that a learned query has."""
    learned = {
        leaf for node in parts.query if weights.is_weight(node) for leaf in axis_map.axes(node)
    }
    found = set(leaves(parts.probabilities)) & (weights.produced | learned)
    return found - parts.keys


def heads_selected(axis_map: AxisMap, weights: Weights, parts: Operands) -> set[Axis]:
    """The leaves along which the core selects from queries or keys, or did so before.

    They are free, or what is selected from has a dimension there that a projection alone brought
    in: something that reads the heads of a side operand may block them.  Values that are selected
    from have the heads of the scores; those must come from the query.
    """
    uses = (*parts.uses["query"], *parts.uses["key"])
    found, projected = set(weights.picked), set[Axis]()
    for use in (use for use in uses if use in axis_map.selected):
        for dim, seen in zip(axis_map.of(use[1]), axis_map.selected[use].dims, strict=True):
            by_projection = weights.produced.issuperset(leaves(dim))
            (projected if by_projection else found).update(leaves(seen))
    free = {leaf for leaf in found if not leaf.block}
    return (free | projected) & set(leaves(parts.probabilities)) - parts.keys


def heads_ended(
    axis_map: AxisMap,
    weights: Weights,
    parts: Operands,
    heads: Heads,
    ends: Iterable[tuple[fx.Node, Contraction]],
) -> Heads:
    """The leaves that output projections sum over (others are lengths made by a projection).

    Where there is no output projection, those that are not positions of a learned query.
    """
    summed = {
        leaf
        for node, contraction in ends
        if weights.summed_with(node, contraction) is not None
        for leaf in leaves(contraction.dim)
    }
    ended = tuple(leaf for leaf in heads if leaf in summed)
    others = {axis for n in (*parts.key, *parts.value) for axis in axis_map.axes(n)}
    if ended:
        shared = tuple(leaf for leaf in ended if leaf in others)
        return shared if shared and _attends_to_channels(weights, parts) else ended
    learned = (axis_map.axes(n) for n in parts.query if weights.sources.get(n))
    rows = set().union(*learned) - others
    return tuple(leaf for leaf in heads if leaf not in rows)


def _attends_to_channels(weights: Weights, parts: Operands) -> bool:
    """Whether the scores are those of channels with channels (cross-covariance attention)."""
    return bool(parts.keys) and parts.keys <= weights.produced


def head_dim_of(weights: Weights, parts: Operands) -> int:
    """The width of a head: of what the scores sum over, or of the channels attended to."""
    channels = _attends_to_channels(weights, parts)
    return prod(axis.size for axis in parts.keys) if channels else parts.head_dim
