"""Which values of a program are made from parameters alone, and which axes they carry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxslim import graph
from fxslim.analysis import AxisMap
from fxslim.axes import Axis, Dim, leaves
from fxslim.calls import Contraction

__all__ = ["Weights"]


class Weights:
    """The parameters behind each value that depends on no input.

    Attributes:
        sources: for each such node, the `get_attr` nodes of the parameters it is made from.
        products: those of them that are made by a product (a projected latent, a position network).
        produced: the leaves that a weight brings into some product: the outputs of projections.
        picked: the leaves of constant indices, such as those that heads were selected by before.
        origins: for each leaf, the dims that hold it where values begin: of parameters, of what is
            created, and of operands that are selected from.
    """

    def __init__(self, axis_map: AxisMap) -> None:
        self.axis_map = axis_map
        self.sources: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.products: set[fx.Node] = set()
        for node in axis_map.dims:
            if node.op == "get_attr":
                parameter = isinstance(_tensor(axis_map, node), torch.nn.Parameter)
                self.sources[node] = (node,) if parameter else ()
            elif node.op == "call_function":
                self._visit(node)
        self.produced = {
            leaf
            for node, contractions in axis_map.contractions.items()
            for contraction in contractions
            if self.is_weight(contraction.operand)
            for leaf in self.brought_in(node, contraction)
        }
        self.picked = {
            leaf
            for node in axis_map.dims
            if graph.constant(node) is not None
            for leaf in self.axis_map.axes(node)
        }
        self.origins: dict[Axis, list[Dim]] = {}
        begin = [axis_map.of(n) for n in axis_map.dims if not graph.tensor_inputs(n)]
        begin += [selected.dims for selected in axis_map.selected.values()]
        for dim in (dim for dims in begin for dim in dims):
            for leaf in dict.fromkeys(leaves(dim)):
                self.origins.setdefault(leaf, []).append(dim)

    def _visit(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        if not all(operand in self.sources for operand in inputs):
            return
        merged = (source for operand in inputs for source in self.sources[operand])
        self.sources[node] = tuple(dict.fromkeys(merged))
        if node in self.axis_map.contractions or any(n in self.products for n in inputs):
            self.products.add(node)

    def is_weight(self, node: fx.Node) -> bool:
        """Whether `node` is a parameter, or one rearranged and scaled."""
        return bool(self.sources.get(node)) and node not in self.products

    def brought_in(self, node: fx.Node, contraction: Contraction) -> set[Axis]:
        """The leaves of a contracted operand's dimensions that the product keeps.

        A dimension that is the very one that is summed over (a layer applied to its own output)
        brings in nothing; one that shares a factor with it (heads cut out of the channels) does.
        Nor does one that no parameter has (a batch that learned queries were expanded to).
        """
        summed = set(leaves(contraction.dim))
        kept = [
            set(leaves(dim))
            for d, dim in enumerate(self.axis_map.seen_by(node, contraction.operand))
            if d != contraction.dimension
        ]
        whole = set(leaves(self.axis_map.seen_by(node, contraction.operand)[contraction.dimension]))
        factors = whole - summed  # of the dimension itself, where only some are summed over
        owned = (self.axis_map.axes(source) for source in self.sources.get(contraction.operand, ()))
        return factors.union(*(dim for dim in kept if not dim <= summed)) & set().union(*owned)

    def behind(self, node: fx.Node, axes: set[Axis]) -> list[fx.Node]:
        """The parameters behind a weight that carry any of `axes`."""
        return [s for s in self.sources.get(node, ()) if self.axis_map.axes(s) & axes]

    def summed_with(
        self, node: fx.Node, contraction: Contraction
    ) -> dict[fx.Node, list[int]] | None:
        """The parameters that `node` sums `contraction` against; None if there is none.

        Each with the dimensions that are summed over.  A gate that is made from all heads for all
        heads has them twice; where it is rearranged first, both of its dimensions count.
        """
        axes = set(leaves(contraction.dim))
        for other in self.axis_map.contractions[node]:
            if self.sources.get(other.operand) and set(leaves(other.dim)) & axes:
                found = self.behind(other.operand, axes)
                own = [other.dimension]
                return {w: own if w is other.operand else self._carrying(w, axes) for w in found}
        return None

    def _carrying(self, weight: fx.Node, axes: set[Axis]) -> list[int]:
        """The dimensions of a parameter that have any of `axes`."""
        return [d for d, dim in enumerate(self.axis_map.of(weight)) if set(leaves(dim)) & axes]

    def bias_of(self, product: fx.Node, weight: fx.Node) -> str | None:
        """The name of the parameter that `product` adds to what it makes of `weight`."""
        contracted = {c.operand for c in self.axis_map.contractions.get(product, ())}
        axes = self.axis_map.axes(weight)
        for operand in graph.tensor_inputs(product):
            if operand in contracted or not self.is_weight(operand):
                continue
            if self.axis_map.axes(operand) & axes:
                return str(self.sources[operand][0].target)
        return None

    def data_operands(self, contractions: Sequence[Contraction]) -> list[fx.Node]:
        """The contracted operands that are no weights, in order."""
        return list(dict.fromkeys(c.operand for c in contractions if not self.is_weight(c.operand)))


def _tensor(axis_map: AxisMap, node: fx.Node) -> object:
    return graph.attribute(axis_map.program, str(node.target))
