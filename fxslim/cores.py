"""Cores: scores from two activations, normalised along the key length, summed with a third.

No operator is named here.  A core starts at an operator whose row says that it makes probabilities
(or is a whole attention); see `fxslim.operands` for what lies around it.  Its heads are the axes of
the probabilities that a projection brings in and an output projection sums over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from fxslim import graph
from fxslim.analysis import AxisMap, Use
from fxslim.axes import Axis, Dim, leaves, resolve
from fxslim.calls import Contraction
from fxslim.follow import closure, operands_with, sums
from fxslim.heads import head_dim_of, heads_brought_in, heads_ended, heads_selected
from fxslim.operands import Operands, find_operands
from fxslim.refine import beginning_with_unit
from fxslim.refusals import ONE_HEAD, projecting, why_headless, why_inseparable
from fxslim.weights import Weights

__all__ = ["Core", "find_cores"]

End = tuple[fx.Node, Contraction]


@dataclass(frozen=True)
class Core:
    """One softmax (or whole attention) between projections.

    Attributes:
        node: the operator that makes the probabilities.
        context: the nodes that sum probabilities times values over the key length.
        heads: the head axes, outer to inner.
        head_dim_factors: the factors of the probabilities that carry them.
        projections: for query, key and value, (weight, product) pairs.
        ends: where the heads of the context are summed over.
        side: uses of operands that join in from the side and carry heads, with their ancestors.
        uses: where queries and keys (by the scores) and values (by the context) are used.
        refusal: why its heads cannot be told apart; empty if they can.
    """

    node: fx.Node
    context: tuple[fx.Node, ...]
    heads: tuple[Axis, ...]
    head_dim_factors: Dim
    head_dim: int
    is_cross: bool
    projections: dict[str, list[tuple[fx.Node, fx.Node]]]
    ends: tuple[End, ...] = ()
    side: dict[Use, frozenset[fx.Node]] = field(default_factory=dict)
    uses: dict[str, tuple[Use, ...]] = field(default_factory=dict)
    refusal: str = ""

    @property
    def weights(self) -> frozenset[fx.Node]:
        """The query's weights: layers that share them are pruned together anyway."""
        return frozenset(weight for weight, _ in self.projections["query"])

    @property
    def is_single(self) -> bool:
        """Whether it is one head, which others lie beside."""
        return [axis.size for axis in self.heads] == [1]


def find_cores(axis_map: AxisMap, weights: Weights) -> list[Core]:
    """Every core of the program, in the order of its graph."""
    finder = _Finder(axis_map, weights)
    cores = (finder.core(operands) for operands in find_operands(axis_map, weights))
    return [core for core in cores if core is not None]


class _Finder:
    def __init__(self, axis_map: AxisMap, weights: Weights) -> None:
        self.axis_map = axis_map
        self.weights = weights
        self.order = {node: i for i, node in enumerate(axis_map.program.graph.nodes)}

    def core(self, parts: Operands) -> Core | None:
        """The core with its heads, or None if what lies around is no attention."""
        selected = heads_selected(self.axis_map, self.weights, parts)
        candidates = heads_brought_in(self.axis_map, self.weights, parts) | selected
        projections = {
            "query": self._projections(parts.query, candidates),
            "key": self._projections(parts.key, candidates),
            "value": self._projections(parts.value, candidates),
        }
        carried = {
            leaf
            for role in ("query", "key")
            for weight, _ in projections[role]
            for leaf in self.axis_map.axes(weight)
        }
        heads = tuple(
            leaf
            for leaf in dict.fromkeys(leaves(parts.probabilities))
            if leaf in candidates and leaf in carried | selected
        )
        occurring = [leaf for leaf in leaves(parts.probabilities) if leaf in heads]
        if not heads or len(occurring) > len(heads):  # a leaf that is paired with itself
            return self._headless(parts, candidates, projections)
        ends = self._ends(parts, set(heads))
        heads = heads_ended(self.axis_map, self.weights, parts, heads, ends)
        if not heads:
            return self._headless(parts, set(), projections)
        ends = self._ends(parts, set(heads))
        side = self._side(parts, projections, set(heads), ends)
        return Core(
            node=parts.node,
            context=tuple(parts.context),
            heads=heads,
            head_dim_factors=_carrying(parts.probabilities, set(heads)),
            head_dim=head_dim_of(self.weights, parts),
            is_cross=self._is_cross(parts),
            projections=projections,
            ends=tuple(ends),
            side=side,
            uses=parts.uses,
            refusal=why_inseparable(self.axis_map, self.weights, parts, set(heads), side),
        )

    def _projections(
        self, operands: Iterable[fx.Node], axes: set[Axis]
    ) -> list[tuple[fx.Node, fx.Node]]:
        """(weight, product) pairs from which `axes` of the operands come."""
        if not axes:
            return []
        found = []

        def carrying(node: fx.Node) -> Iterable[fx.Node]:
            return operands_with(self.axis_map, node, axes)

        for node in closure(operands, carrying):
            for contraction in self.axis_map.contractions.get(node, ()):
                if self.weights.brought_in(node, contraction) & axes:
                    behind = self.weights.behind(contraction.operand, axes)
                    found += [(weight, node) for weight in behind]
            if node.op == "get_attr" and node in operands:
                found.append((node, node))
        return list(dict.fromkeys(found))

    def _headless(
        self,
        parts: Operands,
        candidates: set[Axis],
        projections: dict[str, list[tuple[fx.Node, fx.Node]]],
    ) -> Core | None:
        """An attention whose heads cannot be told apart, if it is one at all."""
        roles = (parts.query, parts.key, parts.value)
        projected = [any(map(self._is_projected, operands)) for operands in roles]
        learned = any(self.weights.is_weight(node) for node in parts.query)
        if not (projected[0] or learned) or not all(projected[1:]):
            return None
        reason = why_headless(self.axis_map, self.weights, parts, candidates)
        mixing = {"query": self._projections([parts.node], candidates)}
        single, ends = self._single(parts) if reason == ONE_HEAD else ((), [])
        if single:
            projections["value"] = self._projections(parts.value, set(single))
        return Core(
            node=parts.node,
            context=tuple(parts.context),
            heads=single,
            head_dim_factors=single,
            head_dim=parts.head_dim,
            is_cross=self._is_cross(parts),
            projections=projections,
            ends=tuple(ends),
            side=self._side(parts, mixing, candidates, ends),
            uses=parts.uses,
            refusal="" if single else reason,
        )

    def _is_projected(self, operand: fx.Node) -> bool:
        return any(projecting(self.axis_map, self.weights, operand))

    def _single(self, parts: Operands) -> tuple[tuple[Axis, ...], list[End]]:
        """The head of an attention that is one head of several: its context goes by itself.

        The contexts of such attentions lie side by side before one output projection.  A unit
        begins the width of the context, and without it nothing of the attention is left.
        """
        widths = {
            dim
            for node in parts.context
            for dim in map(resolve, self.axis_map.of(node))
            if dim and self.weights.produced.issuperset(leaves(dim))
        }
        if len(widths) != 1:
            return (), []
        (width,) = widths
        ends = self._ends(parts, set(leaves(width)))
        if not ends or not all(_is_part(width, contraction.dim) for _, contraction in ends):
            return (), []
        unit, _ = beginning_with_unit(width)
        return unit, ends

    def _is_cross(self, parts: Operands) -> bool:
        """Keys of another length axis, that are not made from what the queries are made from."""
        query, key = parts.query[0], parts.key[0]
        if parts.keys & self.axis_map.axes(query):
            return False
        source = self._input_of(query)
        start = self.order[source]

        def later(node: fx.Node) -> Iterable[fx.Node]:
            return (n for n in graph.tensor_inputs(node) if self.order[n] >= start)

        return source not in closure([self._input_of(key)], later)

    def _input_of(self, operand: fx.Node) -> fx.Node:
        """The activation that the nearest projection behind `operand` is applied to."""
        for node in closure([operand], graph.tensor_inputs):
            data = self.weights.data_operands(self.axis_map.contractions.get(node, []))
            if data:
                return data[0]
        return operand

    # -------------------------------------------------------------------- its end and its sides

    def _ends(self, parts: Operands, heads: set[Axis]) -> list[End]:
        """Where the heads of the context are summed over."""
        seen, stack = set(parts.context), list(parts.context)
        found: dict[tuple[fx.Node, fx.Node, int], End] = {}
        while stack:
            value = stack.pop()
            for user in value.users:
                for c in sums(self.axis_map, user, value, heads):
                    found[user, value, c.dimension] = (user, c)
                if user not in seen and self.axis_map.axes(user) & heads:
                    seen.add(user)
                    stack.append(user)
        return sorted(found.values(), key=lambda end: self.order[end[0]])

    def _side(
        self,
        parts: Operands,
        projections: dict[str, list[tuple[fx.Node, fx.Node]]],
        heads: set[Axis],
        ends: Iterable[End],
    ) -> dict[Use, frozenset[fx.Node]]:
        """Operands that carry the heads and come from none of the core's projections.

        Where the core selects its heads from what it projects, they begin at that use.
        """
        products = {product for pairs in projections.values() for _, product in pairs}
        uses = (use for role in parts.uses.values() for use in role)
        selected = {use for use in uses if use in self.axis_map.selected}
        last = {node for node, _ in ends}

        def after(node: fx.Node) -> Iterable[fx.Node]:
            return (u for u in node.users if u not in last and self.axis_map.axes(u) & heads)

        def back(node: fx.Node) -> Iterable[fx.Node]:
            return operands_with(self.axis_map, node, heads)

        region = closure((*products, *(user for user, _ in selected)), after)
        found: dict[Use, frozenset[fx.Node]] = {}
        for node in region:
            contracted = {c.operand for c in self.axis_map.contractions.get(node, ())}
            for operand in graph.tensor_inputs(node):
                joined = operand in region or operand in contracted or (node, operand) in selected
                if joined or node in products:
                    continue
                if {x for d in self.axis_map.seen_by(node, operand) for x in leaves(d)} & heads:
                    found[node, operand] = frozenset(closure([operand], back))
        return found


def _is_part(dim: Dim, whole: Dim) -> bool:
    """Whether `dim`, or the unit it begins with, lies beside others in `whole`."""
    parts = [resolve(part) for factor in resolve(whole) for part in factor.parts or ()]
    return dim in parts or dim[:1] in parts


def _carrying(dim: Dim, axes: set[Axis]) -> Dim:
    """The factors of `dim` that carry any of `axes`."""
    return tuple(factor for factor in resolve(dim) if set(leaves((factor,))) & axes)
