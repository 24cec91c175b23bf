"""Cut: attentions of which a graph has only one side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from fxslim.axes import members
from fxslim.follow import closure
from fxslim.rules import row_for
from fxslim.sites import Located
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
        if row.attention is not None:
            yield node
        elif row.probability:
            own = {axis for dim in axis_map.of(node) for axis in members(dim)}

            def related(n: fx.Node, own: set[object] = own) -> Iterable[fx.Node]:
                near = (*n.all_input_nodes, *n.users)
                return (m for m in near if m in axis_map.dims and axis_map.axes(m) & own)

            around = closure([node], related)
            if any(len(weights.data_operands(axis_map.contractions.get(n, ()))) > 1 for n in around):
                yield node
