"""Positions: which of them an axis's coordinates are at, and which stay when it is narrowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from fxslim.axes import SYMBOLIC, Axis, Dim, resolve, size

__all__ = ["Keep", "coordinates", "kept_positions", "narrowed_size"]


def coordinates(dim: Dim, leaf: Axis) -> list[int]:
    """For each position of `dim`, its coordinate along `leaf`; -1 where it has none."""
    if size(dim) >= SYMBOLIC:
        raise OverflowError("the positions of a symbolic length cannot be listed")
    result = [-1]
    for axis in resolve(dim):
        if axis is leaf:
            own = list(range(axis.size))
        elif axis.parts is None:
            own = [-1] * axis.size
        else:
            own = [c for part in axis.parts for c in coordinates(part, leaf)]
        result = [max(outer, inner) for outer in result for inner in own]
    return result


Keep = Mapping[Axis, Sequence[int]]
"""Leaves to narrow, each with the coordinates that stay, ascending."""


def kept_positions(dim: Dim, keep: Keep) -> list[int]:
    """The positions of `dim` that stay when every leaf in `keep` keeps only those coordinates.

    Raises:
        OverflowError: the dimension has a symbolic length, whose positions cannot be listed.
    """
    if size(dim) >= SYMBOLIC:
        raise OverflowError("the positions of a symbolic length cannot be listed")
    result = [0]
    for axis in resolve(dim):
        own: Sequence[int]
        if axis.parts is None:
            own = keep.get(axis, range(axis.size))
        else:
            starts = accumulate((size(part) for part in axis.parts), initial=0)
            own = [
                start + position
                for start, part in zip(starts, axis.parts, strict=False)
                for position in kept_positions(part, keep)
            ]
        result = [outer * axis.size + inner for outer in result for inner in own]
    return result


def narrowed_size(dim: Dim, keep: Keep) -> int:
    """``len(kept_positions(dim, keep))``, without listing them (a length may be symbolic)."""
    total = 1
    for axis in resolve(dim):
        if axis.parts is None:
            total *= len(keep[axis]) if axis in keep else axis.size
        else:
            total *= sum(narrowed_size(part, keep) for part in axis.parts)
    return total
