"""Walk: a program run on many batches side by side, one stretch of the graph after another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxslim.graph import attribute
from fxslim.program import flat_inputs

__all__ = ["Call", "Walk"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Walk:
    """The values of a program at one place of its graph, for every batch.

    Only what is still needed is held: between two layers that is the residual stream.  What depends
    on no input (a weight, its transpose) is read when it is asked for, so that a weight that
    changes meanwhile is seen.

    Args:
        program: a captured program; not changed.
        calls: positional and keyword arguments of each batch.
        pinned: nodes whose values are held until `release`.
    """

    def __init__(
        self, program: fx.GraphModule, calls: Sequence[Call], pinned: Iterable[fx.Node] = ()
    ) -> None:
        self.program = program
        self.nodes = list(program.graph.nodes)
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self._calls = calls
        self._constants = _constants(self.nodes)
        held = set(pinned)
        self._ends: dict[fx.Node, list[fx.Node]] = {}
        for node in self.nodes:
            if node not in self._constants and node not in held:
                self._ends.setdefault(self._last_use(node), []).append(node)
        self.restart()

    def restart(self) -> None:
        """Back to the inputs."""
        self._at = 0
        self._values: list[dict[fx.Node, Any]] = []
        places = [node for node in self.nodes if node.op == "placeholder"]
        for args, kwargs in self._calls:
            flat = flat_inputs(self.program, args, kwargs)
            self._values.append(dict(zip(places, flat, strict=True)))

    def advance(self, end: fx.Node) -> None:
        """Compute everything that comes before `end`, for every batch."""
        stretch = self.nodes[self._at : self.place[end]]
        self._at = max(self._at, self.place[end])
        memo: dict[fx.Node, Any] = {}  # constants are the same for every batch
        for values in self._values:
            for node in stretch:
                if node.op == "call_function" and node not in self._constants:
                    values[node] = self._call(node, values, memo)
                for done in self._ends.get(node, ()):
                    values.pop(done, None)

    def value(self, node: fx.Node, batch: int) -> Any:
        """The value of a node that was computed and is still needed, for one batch."""
        return self._read(node, self._values[batch], {})

    def values(self, node: fx.Node) -> list[Any]:
        """The same for every batch."""
        return [self.value(node, batch) for batch in range(len(self._values))]

    def result(self, node: fx.Node, batch: int) -> Any:
        """What `node`, the next to come, makes of what is there."""
        return self._call(node, self._values[batch], {})

    def through(self, start: fx.Node, chain: Sequence[fx.Node], value: Any, batch: int) -> Any:
        """What a chain of nodes makes of a value in place of `start`'s."""
        values = self._values[batch] | {start: value}
        for node in chain:
            values[node] = value = self._call(node, values, {})
        return value

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a node depends on no input."""
        return node in self._constants

    def constant(self, node: fx.Node, instead: Mapping[fx.Node, Any] | None = None) -> Any:
        """A value that depends on no input, with others in place of some that it is made from."""
        return self._read(node, dict(instead or {}), {})

    def release(self, *nodes: fx.Node) -> None:
        """Pinned values are held no longer than others."""
        for node in nodes:
            last = self._last_use(node)
            if self.place[last] >= self._at:
                self._ends.setdefault(last, []).append(node)
            else:
                for values in self._values:
                    values.pop(node, None)

    def _call(self, node: fx.Node, values: dict[fx.Node, Any], memo: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda operand: self._read(operand, values, memo)
        )
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _read(self, node: fx.Node, values: dict[fx.Node, Any], memo: dict[fx.Node, Any]) -> Any:
        if node in values:
            return values[node]
        if node not in memo:
            if node.op == "get_attr":
                memo[node] = attribute(self.program, str(node.target))
            else:
                memo[node] = self._call(node, values, memo)
        return memo[node]

    def _last_use(self, node: fx.Node) -> fx.Node:
        return max(node.users, key=self.place.__getitem__, default=node)


def _constants(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes that depend on no input."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op == "get_attr":
            found.add(node)
        elif node.op == "call_function" and not _random(node):
            found |= {node} if found.issuperset(node.all_input_nodes) else set()
    return found


def _random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags
