"""Cut: attentions of which a graph has only one side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from fxslim.analysis import AxisMap
from fxslim.follow import closure
from fxslim.placed import Located
from fxslim.rules import row_for
from fxslim.weights import Weights

__all__ = ["cut_attention"]


def cut_attention(located: Located) -> Iterator[fx.Node]:
    """Operators that make probabilities of no site, beside a product of two activations.

    The product has the head axes or the key length that the probabilities have; a router or the
    scores of classes are multiplied by weights only.
    """
    axis_map = located.axis_map
    weights = Weights(axis_map)
    known = {name for site in located.sites for name in site.cores}
    for node in axis_map.dims:
        row = row_for(node) if node.op == "call_function" else None
        if row is None or node.name in known:
            continue
        if row.attention is not None or _beside_activations(axis_map, weights, node):
            yield node


def _beside_activations(axis_map: AxisMap, weights: Weights, node: fx.Node) -> bool:
    """Whether a node that makes probabilities shares an axis with a product of activations."""
    row = row_for(node)
    if row is None or not row.probability:
        return False
    own = axis_map.axes(node)

    def related(n: fx.Node) -> Iterable[fx.Node]:
        return (m for m in (*n.all_input_nodes, *n.users) if m in axis_map.dims)

    def sharing(n: fx.Node) -> Iterable[fx.Node]:
        return (m for m in related(n) if axis_map.axes(m) & own)

    contractions = (axis_map.contractions.get(n, ()) for n in closure([node], sharing))
    return any(len(weights.data_operands(found)) > 1 for found in contractions)
