"""Positions: which of them an axis's coordinates are at, and which stay when it is narrowed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from fxslim.axes import SYMBOLIC, Axis, Dim, leaves, resolve, size
from fxslim.errors import PlanError

__all__ = [
    "Keep",
    "Uneven",
    "coordinates",
    "kept_before",
    "kept_positions",
    "narrowed_size",
    "tells_groups",
]


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


@dataclass(frozen=True)
class Uneven:
    """Coordinates that stay along an axis: others, but as many, for each coordinate of a group.

    Attributes:
        group: the axis whose coordinates have rows of their own.
        rows: for each coordinate of the group that stays, the coordinates that stay, ascending.
    """

    group: Axis
    rows: Mapping[int, Sequence[int]]

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))


_SHARED = (
    "the plan keeps other query heads in one KV group than in another, but the model has something "
    "that all groups share; keep the same ones in every group of the site"
)

Keep = Mapping[Axis, Sequence[int] | Uneven]
"""Leaves to narrow, each with the coordinates that stay, ascending."""


def kept_positions(dim: Dim, keep: Keep) -> list[int]:
    """The positions of `dim` that stay when every leaf in `keep` keeps only those coordinates.

    Raises:
        OverflowError: the dimension has a symbolic length, whose positions cannot be listed.
        PlanError: they are not the same for all groups, and the dimension does not tell groups.
    """
    if size(dim) >= SYMBOLIC:
        raise OverflowError("the positions of a symbolic length cannot be listed")
    factors = resolve(dim)
    for leaf in leaves(factors):
        kept = keep.get(leaf)
        if isinstance(kept, Uneven) and kept.group in factors:
            return _group_by_group(factors, keep, leaf, kept)
    result = [0]
    for axis in factors:
        own: Sequence[int]
        if axis.parts is None:
            own = _the_same(keep.get(axis, range(axis.size)))
        else:
            starts = accumulate((size(part) for part in axis.parts), initial=0)
            own = [
                start + position
                for start, part in zip(starts, axis.parts, strict=False)
                for position in kept_positions(part, keep)
            ]
        result = [outer * axis.size + inner for outer in result for inner in own]
    return result


def _group_by_group(factors: Dim, keep: Keep, axis: Axis, kept: Uneven) -> list[int]:
    """The positions that stay, in the order of the narrow dimension, of which one factor groups."""
    rows = [
        kept_positions(factors, {**keep, axis: row, kept.group: [coordinate]})
        for coordinate, row in kept.rows.items()
    ]
    outer = narrowed_size(factors[: factors.index(kept.group)], keep)
    width = len(rows[0]) // outer if outer else 0
    return [p for n in range(outer) for row in rows for p in row[n * width : (n + 1) * width]]


def _the_same(kept: Sequence[int] | Uneven) -> Sequence[int]:
    """What stays, where a position belongs to all groups."""
    if not isinstance(kept, Uneven):
        return kept
    first, *others = kept.rows.values()
    if any(list(row) != list(first) for row in others):
        raise PlanError(_SHARED)
    return first


def tells_groups(dim: Dim, axis: Axis, group: Axis) -> bool:
    """Whether a position of `dim` that has a coordinate along `axis` has one along `group`."""
    factors = resolve(dim)
    if axis not in leaves(factors) or group in factors:
        return True
    parts = [part for factor in factors for part in factor.parts or ()]
    return axis not in factors and all(tells_groups(part, axis, group) for part in parts)


def kept_before(dim: Dim, keep: Keep, ends: Sequence[int]) -> list[int]:
    """For each of `ends`, how many positions of `dim` before it stay.

    Raises:
        OverflowError: the dimension has a symbolic length, whose positions cannot be listed.
        PlanError: there are as many in each group, but not before each of `ends`.
    """
    rows = {
        leaf: list(kept.rows.values()) if isinstance(kept, Uneven) else [kept]
        for leaf in leaves(dim)
        if (kept := keep.get(leaf)) is not None
    }
    counts = []
    for n in range(max(map(len, rows.values()), default=1)):
        even = {leaf: choices[n % len(choices)] for leaf, choices in rows.items()}
        kept_there = kept_positions(dim, even)
        counts.append([bisect_left(kept_there, end) for end in ends])
    if any(other != counts[0] for other in counts):
        raise PlanError(_SHARED)
    return counts[0]


def narrowed_size(dim: Dim, keep: Keep) -> int:
    """``len(kept_positions(dim, keep))``, without listing them (a length may be symbolic)."""
    total = 1
    for axis in resolve(dim):
        if axis.parts is None:
            total *= len(keep[axis]) if axis in keep else axis.size
        else:
            total *= sum(narrowed_size(part, keep) for part in axis.parts)
    return total
