"""One operator call, as a rule sees it: named arguments, the dims of its operands, what it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxslim import graph
from fxslim.axes import Block, Dim, block

__all__ = ["Call", "Contraction", "Dims", "RuleMismatch"]

Dims = tuple[Dim, ...]
"""The dims of one tensor."""


class RuleMismatch(ValueError):
    """A rule met a call whose shapes it does not describe; the analysis refuses the call."""


@dataclass(frozen=True)
class Contraction:
    """One operand of a sum: the factors `dim` of its `dimension` are summed over."""

    operand: fx.Node
    dimension: int
    dim: Dim


@dataclass
class Call:
    """A call of an operator, with the dims of its operands.

    `shapes` are the sizes of its results; `contracted` collects what the call sums over,
    `paired` the lengths that only the input makes equal.
    """

    node: fx.Node
    operand: Callable[[fx.Node], Dims]
    arguments: dict[str, Any]
    shapes: list[tuple[int, ...]]
    contracted: list[Contraction] = field(default_factory=list)
    paired: list[tuple[Dim, Dim]] = field(default_factory=list)

    def why(self, what: str) -> Block:
        """A reason that names this call."""
        return Block(what, self.node.name)

    def dims(self, name: str) -> Dims:
        """The dims of the tensor argument `name`."""
        return self.operand(self.arguments[name])

    def tensors(self) -> list[fx.Node]:
        """The tensor arguments in order, lists of tensors written out, absent ones left out."""
        found: list[fx.Node] = []
        for value in self.arguments.values():
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, fx.Node) and graph.is_tensor(item):
                    found.append(item)
        return found

    def axis(self, name: str = "dim", tensor: str = "self") -> int:
        """The argument `name` as a non-negative dimension of `tensor`."""
        rank = len(self.dims(tensor))
        return int(self.arguments[name]) % max(rank, 1)

    def axes(self, name: str = "dim", tensor: str = "self") -> list[int]:
        """The argument `name` as dimensions of `tensor`; all of them where it is absent."""
        rank = len(self.dims(tensor))
        value = self.arguments.get(name)
        if value is None or value == []:
            return list(range(rank))
        return (
            [d % rank for d in (value if isinstance(value, Sequence) else [value])] if rank else []
        )

    def number(self, name: str) -> int:
        """The integer argument `name`; a symbolic one at the generic point."""
        value = self.arguments[name]
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        return graph.generic_size(value)

    def bound(self, name: str, length: int, default: int) -> int:
        """A slice's start or end, as Python counts it, clipped to the length."""
        if self.arguments[name] is None:
            return default
        value = self.number(name)
        if value >= sys.maxsize:  # how export writes "to the end"; generic lengths are larger
            return length
        return min(max(value + length if value < 0 else value, 0), length)

    def reads(self, dim: Dim, how: str = "reads it as a whole") -> None:
        """Block `dim`: this operator's result at one position depends on the others."""
        block(dim, self.why(how))

    def contracts(self, operand: fx.Node, dimension: int, dim: Dim | None = None) -> None:
        """Record that the call sums over a dimension of `operand`, or its factors `dim`."""
        whole = self.operand(operand)[dimension]
        self.contracted.append(Contraction(operand, dimension, whole if dim is None else dim))
