"""Axes: what every dimension of every tensor is made of.

A *dimension* (`Dim`) is a tuple of axes, outer to inner: a tensor of shape (batch, heads * width)
has the dims ``(b,)`` and ``(h, d)``.  An `Axis` is an identity, not a size: two axes become one
only by `join`, when an operator proves that they run together.  An axis that looked atomic may turn
out to be made of others, and then it is so everywhere at once:

* *factors* (a product), when a view splits it: ``hidden = heads x head_dim``;
* *parts* (a direct sum), when a slice cuts it or a concatenation builds it: ``qkv = q | k | v``.

What is left atomic is a *leaf*.  A leaf that some operator reads as a whole is *blocked*: it
carries who read it and why.  Sizes are plain integers; a symbolic length is represented by the
value of its expression at one generic point (see `fxslim.graph`), so that products and sums compare
exactly.

An axis is only ever *refined* (split, unified, blocked; see `fxslim.refine`): every dim written
down earlier stays true, which is why one forward walk over a graph is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

__all__ = [
    "SYMBOLIC",
    "Axis",
    "Block",
    "Dim",
    "block",
    "blocks",
    "fresh",
    "leaves",
    "members",
    "representative",
    "resolve",
    "size",
]


@dataclass(frozen=True)
class Block:
    """Why an axis cannot be pruned: the operator (node name) that reads it, and how."""

    why: str
    where: str = ""
    unruled: str = ""
    """The operator's name, where the reason is that the table has no rule for it."""


class Axis:
    """One logical dimension, up to identity; compare representatives (`leaves`), never sizes."""

    __slots__ = ("block", "factors", "parts", "same", "size")

    def __init__(self, size: int, block: Block | None = None) -> None:
        self.size = size
        self.block = block
        self.same: Axis | None = None
        self.factors: Dim | None = None
        self.parts: tuple[Dim, ...] | None = None

    def __repr__(self) -> str:
        return f"Axis({self.size}{', blocked' if self.block else ''})"


Dim = tuple[Axis, ...]

SYMBOLIC = 2**32
"""Sizes from here on stand for symbolic lengths (see `fxslim.graph.generic_size`)."""


def fresh(n: int, blocked: Block | None = None) -> Dim:
    """A new dimension of `n` positions that is related to nothing yet; no axis at all if n is 1."""
    return () if n == 1 else (Axis(n, blocked),)


def size(dim: Dim) -> int:
    """The number of positions of `dim`."""
    return prod(axis.size for axis in dim)


def representative(axis: Axis) -> Axis:
    """The axis that stands for all those that `axis` was unified with."""
    root = axis
    while root.same is not None:
        root = root.same
    while axis.same is not None:
        axis.same, axis = root, axis.same
    return root


def resolve(dim: Dim) -> Dim:
    """`dim` in its present factors: representatives only, products written out."""
    out: list[Axis] = []
    for axis in dim:
        root = representative(axis)
        if root.factors is None:
            out.append(root)
        else:
            root.factors = resolve(root.factors)
            out.extend(root.factors)
    return tuple(out)


def leaves(dim: Dim) -> Iterator[Axis]:
    """The atoms of `dim`, outer to inner and part by part; one may come more than once."""
    for axis in resolve(dim):
        if axis.parts is None:
            yield axis
        else:
            for part in axis.parts:
                yield from leaves(part)


def members(dim: Dim) -> Iterator[Axis]:
    """The leaves of `dim` and the sums that they are parts of (a sum of units has no leaf)."""
    for axis in resolve(dim):
        yield axis
        for part in axis.parts or ():
            yield from members(part)


def block(dim: Dim, why: Block) -> None:
    """Mark every leaf of `dim` as read as a whole; the first reason stays."""
    for leaf in leaves(dim):
        leaf.block = leaf.block or why


def blocks(dim: Dim) -> list[Block]:
    """The reasons why leaves of `dim` are blocked."""
    return [leaf.block for leaf in leaves(dim) if leaf.block]
