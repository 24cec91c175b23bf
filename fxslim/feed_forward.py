"""Feed-forward blocks: channels between projections that read and write one stream.

A block is an axis, as heads are: projections (up, and gate, where there is one) bring its channels
in, and others (down) sum over them.  What tells it from other layers in a row is that it gives back
what it takes: the channels that its up projections sum over are those that its down projections
bring in, as adding a block to its input makes them.  So a classifier, a bias network or a low-rank
adapter of another weight is none; nor are channels that take part in an attention.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from fxslim import graph
from fxslim.analysis import AxisMap
from fxslim.axes import Axis, leaves
from fxslim.calls import Contraction
from fxslim.cores import Core
from fxslim.follow import closure
from fxslim.parts import full_name
from fxslim.placed import Along, FeedForward, positions_along
from fxslim.site_builder import blocked_by
from fxslim.sites import FeedForwardSite, Projection
from fxslim.weights import Weights

__all__ = ["find_blocks"]

End = tuple[fx.Node, Contraction]


def find_blocks(axis_map: AxisMap, weights: Weights, cores: Iterable[Core]) -> list[FeedForward]:
    """Every feed-forward block of the program, in the order of its graph."""
    attended = _attended(axis_map, cores)
    ended = _ended(axis_map, weights)
    found: dict[str, FeedForward] = {}
    for channels, ups in _brought_in(axis_map, weights).items():
        ends = ended.get(channels, [])
        if channels in attended or graph.is_symbolic(channels.size) or not ends:
            continue
        block = _Block(axis_map, weights, channels, ups, ends)
        if block.is_feed_forward():
            placed = block.placed()
            found.setdefault(placed.site.name, placed)  # experts and their channels: one block
    return list(found.values())


def _attended(axis_map: AxisMap, cores: Iterable[Core]) -> set[Axis]:
    """The axes of queries, keys, values and contexts."""
    uses = (use for core in cores for uses in core.uses.values() for use in uses)
    return _axes_of(axis_map, {node for use in uses for node in use})


def _brought_in(axis_map: AxisMap, weights: Weights) -> dict[Axis, list[End]]:
    """For each leaf that weights bring into products with activations: those products."""
    found: dict[Axis, list[End]] = {}
    for node, contractions in axis_map.contractions.items():
        data = weights.data_operands(contractions)
        if all(operand in weights.sources for operand in data):
            continue  # made of parameters and buffers alone
        for c in contractions:
            if weights.is_weight(c.operand):
                brought = weights.brought_in(node, c) - _axes_of(axis_map, data)
                own = (leaf for dim in axis_map.of(c.operand) for leaf in leaves(dim))
                for leaf in dict.fromkeys(leaf for leaf in own if leaf in brought):
                    found.setdefault(leaf, []).append((node, c))
    return found


def _axes_of(axis_map: AxisMap, nodes: Iterable[fx.Node]) -> set[Axis]:
    return {axis for node in nodes for axis in axis_map.axes(node)}


def _ended(axis_map: AxisMap, weights: Weights) -> dict[Axis, list[End]]:
    """For each leaf: where activations are summed over a dimension that has it."""
    found: dict[Axis, list[End]] = {}
    for node, contractions in axis_map.contractions.items():
        for c in contractions:
            if not weights.is_weight(c.operand):
                for leaf in dict.fromkeys(leaves(c.dim)):
                    found.setdefault(leaf, []).append((node, c))
    return found


@dataclass(frozen=True)
class _Block:
    """An axis of channels, the products that bring it in, and those that sum over it."""

    axis_map: AxisMap
    weights: Weights
    channels: Axis
    ups: Sequence[End]
    ends: Sequence[End]

    def is_feed_forward(self) -> bool:
        """Whether it gives what it takes, and is neither a stream nor two layers in a row."""
        return self._gives_what_it_takes() and self._is_all_there_is() and self._transforms()

    def _gives_what_it_takes(self) -> bool:
        """Whether every sum over the channels brings in just what the up projections sum over."""
        taken = {leaf for _, c in self.ups for leaf in leaves(c.dim)}
        return bool(taken) and all(self._given(node) == taken for node, _ in self.ends)

    def _is_all_there_is(self) -> bool:
        """Whether no activation has the channels but by the up projections (a stream's would)."""
        operands = {n for node in self._between for n in graph.tensor_inputs(node) if self._has(n)}
        activations = {node for node in operands if node not in self.weights.sources}
        return activations <= {*self._between, *(node for node, _ in self.ups)}

    def _transforms(self) -> bool:
        """Whether channels are changed, or multiplied by each other, on their way."""
        for node in self._between:
            operands = [n for n in graph.tensor_inputs(node) if n not in self.weights.sources]
            if not graph.moves(node) or len(operands) > 1:
                return True
        return False

    @functools.cached_property
    def _between(self) -> list[fx.Node]:
        """What is made of the up projections' results, until the channels are summed over."""
        ups = [node for node, _ in self.ups]
        ends = {node for node, _ in self.ends}

        def after(node: fx.Node) -> Iterable[fx.Node]:
            return (n for n in node.users if n not in ends and self._has(n))

        return [node for node in closure(ups, after) if node not in ups]

    def placed(self) -> FeedForward:
        """The site with its place in the graph."""
        reason = self._refusal()
        up = self._projections(((node, c.operand) for node, c in self.ups), biased=True)
        downs = ((node, own.operand) for node, _ in self.ends for own in self._downs(node))
        down = self._projections(downs, biased=False)
        size = self.channels.size
        name = down[0].weight.removesuffix(".weight")
        site = FeedForwardSite(name, size, up, down, not reason, reason)
        units = () if reason else (self.channels,) * size
        return FeedForward(site, Along(self.channels), units, None, tuple(self.ends))

    def _has(self, node: fx.Node) -> bool:
        return self.channels in self.axis_map.axes(node)

    def _given(self, node: fx.Node) -> set[Axis]:
        """The leaves that a sum over the channels brings in, and the channels' tensor lacks."""
        data = self.weights.data_operands(self.axis_map.contractions[node])
        brought = (self.weights.brought_in(node, c) for c in self._downs(node))
        return set().union(*brought) - _axes_of(self.axis_map, data)

    def _downs(self, node: fx.Node) -> list[Contraction]:
        """The weights that a sum over the channels multiplies them by."""
        contractions = self.axis_map.contractions[node]
        own = (c for c in contractions if self.channels in set(leaves(c.dim)))
        return [c for c in own if self.weights.is_weight(c.operand)]

    def _refusal(self) -> str:
        """Why no channel can be removed; empty if they can."""
        if self.channels.block:
            return blocked_by(self.axis_map, self.channels, "the channels")
        for node, c in self.ups:
            dims = [set(leaves(dim)) for dim in self.axis_map.seen_by(node, c.operand)]
            others = set().union(*(dim for dim in dims if self.channels not in dim))
            if others & self.axis_map.axes(node):
                return (
                    f"{graph.user_name(node)} has weights of its own for each of several experts, "
                    "whose channels would go together"
                )
        return ""

    def _projections(
        self, uses: Iterable[tuple[fx.Node, fx.Node]], *, biased: bool
    ) -> tuple[Projection, ...]:
        program, heads = self.axis_map.program, Along(self.channels)
        found: dict[str, Projection] = {}
        for user, weight in uses:
            bias = self.weights.bias_of(user, weight) if biased else None
            for source in self.weights.behind(weight, {self.channels}):
                name = full_name(program, str(source.target))
                for position, dim in enumerate(self.axis_map.of(source)):
                    if self.channels in set(leaves(dim)):
                        places = positions_along(heads, [self.channels], dim)
                        assert places is not None  # one axis: as many positions for each channel
                        own = Projection(name, bias and full_name(program, bias), position, *places)
                        found.setdefault(name, own)
        return tuple(found.values())
