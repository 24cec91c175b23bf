"""Operands: from an operator that makes probabilities to the products before and after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx

from fxslim import graph
from fxslim.analysis import AxisMap, Use
from fxslim.axes import Axis, Dim, members, size
from fxslim.follow import closure, operands_with, summed_axes, sums
from fxslim.rules import Row, row_for
from fxslim.weights import Weights

__all__ = ["Operands", "find_operands", "normalised_dimension"]


@dataclass(frozen=True)
class Operands:
    """What a core is made of, before its heads are known."""

    node: fx.Node
    probabilities: Dim
    scores: list[fx.Node]
    query: list[fx.Node]
    key: list[fx.Node]
    value: list[fx.Node]
    context: list[fx.Node]
    keys: set[Axis]
    head_dim: int

    @property
    def uses(self) -> dict[str, tuple[Use, ...]]:
        """Where queries and keys (by the scores) and values (by the context) are used."""
        users = {"query": self.scores, "key": self.scores, "value": self.context}
        operands = {"query": self.query, "key": self.key, "value": self.value}
        return {
            role: tuple(
                (u, n) for u in users[role] for n in operands[role] if n in u.all_input_nodes
            )
            for role in users
        }


def find_operands(axis_map: AxisMap, weights: Weights) -> Iterator[Operands]:
    """The operands of everything that looks like an attention, in the order of the graph."""
    finder = _Finder(axis_map, weights)
    for node in axis_map.dims:
        row = row_for(node) if node.op == "call_function" else None
        operands = finder.ending_at(node, row) if row is not None else None
        if operands is not None:
            finder.contexts.update(operands.context)
            yield operands


def normalised_dimension(axis_map: AxisMap, node: fx.Node) -> int:
    """Along which dimension an operator makes probabilities."""
    return axis_map.call(node).axis(tensor=next(iter(graph.arguments(node))))


class _Finder:
    def __init__(self, axis_map: AxisMap, weights: Weights) -> None:
        self.axis_map = axis_map
        self.weights = weights
        self.order = {node: i for i, node in enumerate(axis_map.program.graph.nodes)}
        self.contexts: set[fx.Node] = set()

    def ending_at(self, node: fx.Node, row: Row) -> Operands | None:
        """The operands of the attention whose probabilities `node` makes, if it makes any."""
        if row.attention is not None:
            return self.whole(node, row.attention)
        if row.probability:
            return self.around(node, normalised_dimension(self.axis_map, node))
        weights = self._over_their_sum(node) if row.quotient else None
        operands = self.around(*weights) if weights is not None else None
        if operands is None or self.contexts.issuperset(operands.context):
            return None  # a softmax came before, and its probabilities were scaled
        return operands

    def _over_their_sum(self, quotient: fx.Node) -> tuple[fx.Node, int] | None:
        """What is divided by its own sum, and over which dimension; or values weighted by it are.

        It is softmax spelt out with something more: exp(x) · mask / (sum of exp(x) · mask + eps).
        """
        contractions = self.axis_map.contractions
        above, below = list(graph.arguments(quotient).values())[:2]
        if not isinstance(above, fx.Node) or not isinstance(below, fx.Node):
            return None

        def back(node: fx.Node) -> Iterable[fx.Node]:
            return () if node in contractions else graph.tensor_inputs(node)

        weights = {above, *(c.operand for c in contractions.get(above, ()))}
        totals = (contractions[n] for n in closure([below], back) if n in contractions)
        for first, *more in totals:
            if first.operand in weights and not more:
                return first.operand, first.dimension
        return None

    def whole(self, node: fx.Node, names: tuple[str, str, str]) -> Operands:
        """The operands of an operator that is a whole attention."""
        arguments = graph.arguments(node)
        query, key, value = (arguments[name] for name in names)
        dims = self.axis_map.of(node)
        return Operands(
            node,
            tuple(axis for dim in dims[:-1] for axis in dim),
            [node],
            [query],
            [key],
            [value],
            [node],
            set(members(self.axis_map.seen_by(node, key)[-2])),
            size(self.axis_map.seen_by(node, query)[-1]),
        )

    def around(self, node: fx.Node, along: int) -> Operands | None:
        """The contractions before and after an operator that makes probabilities along a dimension.

        The values are summed over the dimension that is normalised; in slot attention, which
        normalises over the queries, over another.
        """
        dims = self.axis_map.of(node)
        if not dims:
            return None
        others = [i for i in reversed(range(len(dims))) if i != along and dims[i]]
        found = (self._summed_over(node, position) for position in (along, *others))
        return next((operands for operands in found if operands is not None), None)

    def _summed_over(self, node: fx.Node, along: int) -> Operands | None:
        """The operands of a core whose values are summed over dimension `along`.

        A length of one (a decoder's first step) is no axis: all axes are followed then.
        """
        dims = self.axis_map.of(node)
        keys = self.axis_map.same_positions(dims[along])
        scores = self._scores(node, keys)
        context, value = self._context(node, keys)
        if not scores or not context:
            return None
        query, key, widths = [], [], []
        for product in scores:
            first, second = self._query_and_key(product, keys)
            query.append(first)
            key.append(second)
            widths.append(self._width(product, first))
        others = tuple(axis for i, dim in enumerate(dims) if i != along for axis in dim)
        products = zip(scores, query, key, strict=True)
        if not any(self._has_rows(node, others, keys, *product) for product in products):
            return None
        return Operands(node, others, scores, query, key, value, context, keys, widths[0])

    def _scores(self, node: fx.Node, keys: set[Axis]) -> list[fx.Node]:
        """The contractions of two activations that the probabilities are made of."""

        def back(n: fx.Node) -> Iterable[fx.Node]:
            followed = keys or self.axis_map.axes(node)
            return () if self._is_scores(n) else operands_with(self.axis_map, n, followed)

        earlier = (n for n in closure([node], back) if n not in {node, *self.contexts})
        return sorted(filter(self._is_scores, earlier), key=self.order.__getitem__)

    def _is_scores(self, node: fx.Node) -> bool:
        """Two activations contracted; or an activation with a weight that has heads of its own."""
        contractions = self.axis_map.contractions.get(node, [])
        operands = list(dict.fromkeys(c.operand for c in contractions))
        data = self.weights.data_operands(contractions)
        if len(operands) < 2 or not data:
            return len(contractions) > 1 and len(operands) == 1 and bool(data)
        if len(data) > 1:
            return True
        first, second = (
            self.axis_map.axes(n) - summed_axes(self.axis_map, node, n) for n in operands[:2]
        )
        return bool(first & second)

    def _query_and_key(self, product: fx.Node, keys: set[Axis]) -> tuple[fx.Node, fx.Node]:
        """Which operand is the key: the one with the key length; by position if both have it."""
        contractions = self.axis_map.contractions[product]
        first, last = contractions[0].operand, contractions[-1].operand
        has = [bool(self.axis_map.axes(n) & keys) for n in (first, last)]
        return (last, first) if has == [True, False] else (first, last)

    def _has_rows(
        self,
        node: fx.Node,
        others: Dim,
        keys: set[Axis],
        product: fx.Node,
        query: fx.Node,
        key: fx.Node,
    ) -> bool:
        """Whether the queries of a product are still told apart where the scores are normalised.

        What is normalised over the sequence far behind an attention is none by its scores.
        """
        rows = self._left(product, query) - (self._left(product, key) - keys)

        def back(n: fx.Node) -> Iterable[fx.Node]:
            with_keys = set(operands_with(self.axis_map, n, keys)) if keys else n.all_input_nodes
            return (m for m in operands_with(self.axis_map, n, rows) if m in with_keys)

        return not rows or (
            not rows.isdisjoint(members(others)) and product in closure([node], back)
        )

    def _left(self, product: fx.Node, operand: fx.Node) -> set[Axis]:
        """The axes that dimensions of an operand still have once the product has summed."""
        summed = [c for c in self.axis_map.contractions[product] if c.operand is operand]
        return {
            axis
            for d, dim in enumerate(self.axis_map.seen_by(product, operand))
            for axis in members(dim)
            if not any(axis in members(c.dim) for c in summed if c.dimension == d)
        }

    def _width(self, product: fx.Node, query: fx.Node) -> int:
        return next(size(c.dim) for c in self.axis_map.contractions[product] if c.operand is query)

    def _context(self, node: fx.Node, keys: set[Axis]) -> tuple[list[fx.Node], list[fx.Node]]:
        """The contractions over the key length that the probabilities reach, and the values."""
        path, own = {node}, self.axis_map.axes(node)
        stack, context, values = [node], [], []
        while stack:
            value = stack.pop()
            for user in value.users:
                summed = sums(self.axis_map, user, value, keys)
                if summed and (others := self._others(user, value, path, own)):
                    context.append(user)
                    values += others
                elif (
                    not summed
                    and user not in path
                    and self._has(user, keys or own)
                    and own >= summed_axes(self.axis_map, user, value)
                ):
                    path.add(user)
                    stack.append(user)
        return list(dict.fromkeys(context)), list(dict.fromkeys(values))

    def _has(self, node: fx.Node, axes: set[Axis]) -> bool:
        return node.op != "output" and bool(self.axis_map.axes(node) & axes)

    def _others(
        self, user: fx.Node, operand: fx.Node, path: set[fx.Node], own: set[Axis]
    ) -> list[fx.Node]:
        """What the probabilities are multiplied by: in the contraction, or just before it.

        Nothing in a sum of the probabilities alone, by which they may be divided: it has no axis
        that is not their `own`.
        """
        operands = [c.operand for c in self.axis_map.contractions[user]]
        others = [n for n in operands if n is not operand]
        if others or own >= self.axis_map.axes(user):
            return others
        return [n for n in graph.tensor_inputs(operand) if n not in path]
