"""Refinement: what operators prove about axes.  Split, cut, join, and the brackets of a view.

Axes change in place, and only ever become finer: the dims of every tensor seen before stay true.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod

from fxslim.axes import (
    SYMBOLIC,
    Axis,
    Block,
    Dim,
    block,
    blocks,
    fresh,
    leaves,
    members,
    representative,
    resolve,
    size,
)

__all__ = ["beginning_with_unit", "cut", "join", "regroup", "side_by_side"]

_MOST_PIECES = 4096
"""A sum that would have to be cut into more equal pieces (a symbolic number, say) is blocked."""


def _make_product(axis: Axis, outer: int, why: Block) -> tuple[Dim, Dim]:
    """Split a representative into (outer, size // outer)."""
    inner = axis.size // outer
    if outer == 1 or inner == 1:
        return ((), (axis,)) if outer == 1 else ((axis,), ())
    if axis.parts is None:
        halves = (Axis(outer, axis.block), Axis(inner, axis.block))
        axis.factors = halves
        return (halves[0],), (halves[1],)
    if outer > _MOST_PIECES:
        block((axis,), why)
        axis.parts, axis.factors = None, (Axis(outer, why), Axis(inner, why))
        return axis.factors[:1], axis.factors[1:]
    if any(size(part) % inner for part in axis.parts):
        # The parts run together, piece by piece; their number is fixed.
        first, *others = _cut((axis,), range(inner, axis.size, inner), why)
        count = Axis(outer, Block("indexed position by position", why.where))
    else:
        numbers, (first, *others) = zip(*(_counted(p, inner, why) for p in axis.parts), strict=True)
        count = Axis(outer)
        count.parts = numbers
    for other in others:
        join(first, other, why)
    axis.factors = (count, *first)
    return (count,), first


def _counted(part: Dim, inner: int, why: Block) -> tuple[Dim, Dim]:
    """A part of a sum as (number, inner); a number of 1 is a unit, so that the part can go."""
    number, rest = regroup([part], [size(part) // inner, inner], why)
    if number:
        return number, rest
    return beginning_with_unit(part)


def beginning_with_unit(dim: Dim) -> tuple[Dim, Dim]:
    """`dim` as (unit, rest): all of it goes with the unit."""
    _begin_with_unit(resolve(dim)[0])
    unit, *rest = resolve(dim)
    return (unit,), tuple(rest)


def _begin_with_unit(axis: Axis) -> None:
    """Make a representative (1, axis), unless it is a unit."""
    if axis.size == 1:
        return
    unit, rest = Axis(1, next(iter(blocks((axis,))), None)), Axis(axis.size, axis.block)
    rest.parts = axis.parts
    axis.parts, axis.factors = None, (unit, rest)


def cut(dim: Dim, bounds: Sequence[int], why: Block, *, units: bool = False) -> list[Dim]:
    """Cut `dim` at positions 0 < bounds < size, and return the pieces in order.

    A cut that would go through the middle of an inner factor blocks the whole dimension.  One that
    leaves a single position alone blocks that, unless it is to be a unit.
    """
    pieces = _cut(dim, bounds, why, units=units)
    for piece in pieces:
        if size(piece) == 1 and not units:
            block(piece, why)
    return [() if size(piece) == 1 and blocks(piece) else piece for piece in pieces]


def _cut(dim: Dim, bounds: Sequence[int], why: Block, *, units: bool = False) -> list[Dim]:
    """`cut`, for parts that stay in a sum."""
    dim = resolve(dim)
    if not bounds:
        return [dim]
    outer, rest = dim[0], dim[1:]
    if outer.size == 1:
        return [(outer, *piece) for piece in _cut(rest, bounds, why, units=units)]
    step = size(rest)
    widths = [b - a for a, b in pairwise([0, *bounds, size(dim)])]
    if any(bound % step for bound in bounds):
        block(dim, why)
        return [fresh(width, why) for width in widths]
    widths = [width // step for width in widths]
    if outer.parts is None:
        new = [(Axis(w, outer.block),) if units else fresh(w, outer.block) for w in widths]
        outer.parts = tuple(new)
        return [(*part, *rest) for part in outer.parts]
    return [(*piece, *rest) for piece in _cut_parts(outer, widths, why, units=units)]


def _cut_parts(axis: Axis, widths: Sequence[int], why: Block, *, units: bool) -> list[Dim]:
    """Cut a sum into pieces of `widths`; a piece that spans several parts is a sum of them."""
    assert axis.parts is not None
    ends = list(accumulate(widths))
    pieces: list[list[Dim]] = [[] for _ in widths]
    start, index = 0, 0
    for part in axis.parts:
        stop = start + size(part)
        inside = [end - start for end in ends if start < end < stop]
        for piece in _cut(part, inside, why, units=units):
            while index < len(ends) - 1 and start >= ends[index]:
                index += 1
            pieces[index].append(piece)
            start += size(piece)
    return [side_by_side(piece) for piece in pieces]


def side_by_side(parts: Sequence[Dim]) -> Dim:
    """The direct sum of `parts`, in order (what a concatenation builds)."""
    parts = [part for part in parts if size(part)]
    if len(parts) == 1:
        return parts[0]
    axis = Axis(sum(size(part) for part in parts))
    axis.parts = tuple(parts)
    return (axis,)


def join(a: Dim, b: Dim, why: Block) -> Dim:
    """Declare that `a` and `b` run together, position by position; return what they are now.

    A unit dimension broadcasts.  Where the two factorings have no common refinement, both are
    blocked with `why`.
    """
    a, b = resolve(a), resolve(b)
    if not a or not b:
        if size(a or b) == 1:
            block(a or b, why)
        return a or b
    if size(a) != size(b):
        raise ValueError(f"cannot join dimensions of {size(a)} and {size(b)} positions")
    left, right = list(a), list(b)
    while left and right:
        if left[0] is right[0]:
            left.pop(0), right.pop(0)
        elif not _match_heads(left, right, why):
            break
        left, right = list(resolve(tuple(left))), list(resolve(tuple(right)))
    block((*left, *right), why)
    return resolve(a)


def _match_heads(left: list[Axis], right: list[Axis], why: Block) -> bool:
    """Bring the outermost factors of two factor lists to the same width and unify them."""
    x, y = left[0], right[0]
    if x.size == y.size:
        left.pop(0), right.pop(0)
        _unify(x, y, why)
        return True
    if 1 in (x.size, y.size):
        wide, others = (y, left) if x.size == 1 else (x, right)
        if not set(members((wide,))).isdisjoint(members(tuple(others))):
            return False  # joined with a shifted copy of itself: it would never end
        _begin_with_unit(wide)
        return True
    big, small = (left, right) if x.size > y.size else (right, left)
    if big[0].parts is not None:
        return _match_sum(big, small, why)
    if big[0].size % small[0].size:
        return False
    _make_product(big[0], small[0].size, why)
    return True


def _match_sum(big: list[Axis], small: list[Axis], why: Block) -> bool:
    """Match a sum against as many factors as make up its width, by cutting those at its bounds."""
    axis, width, taken = big[0], 1, 0
    while width < axis.size and taken < len(small):
        factor = small[taken]
        if axis.size % (width * factor.size):
            if axis.size % width or factor.size % (axis.size // width):
                return False
            _make_product(factor, axis.size // width, why)
            small[:] = resolve(tuple(small))
            continue
        width *= factor.size
        taken += 1
    if width != axis.size:
        return False
    other = tuple(small[:taken])
    del big[0], small[:taken]
    _join_parts(axis, other, why)
    return True


def _join_parts(axis: Axis, other: Dim, why: Block) -> None:
    """Join a sum with a dimension of its width, part by part.

    A sum joined with a shifted copy of itself would be cut again and again: both are blocked.
    """
    assert axis.parts is not None
    bounds = _bounds(axis)
    aligned = len(other) == 1 and _bounds(other[0]) == bounds
    if not aligned and set(leaves((axis,))) & set(leaves(other)):
        block(other, why)
        block((axis,), why)
        return
    for part, piece in zip(axis.parts, _cut(other, bounds, why), strict=True):
        join(part, piece, why)


def _bounds(axis: Axis) -> list[int]:
    """Where the parts of a sum meet."""
    return list(accumulate(size(part) for part in axis.parts or ()))[:-1]


def _unify(x: Axis, y: Axis, why: Block) -> None:
    """Make two representatives of one size the same axis."""
    if x.parts is None and y.parts is None:
        x.same, y.block = y, y.block or x.block
    elif x.parts is None or y.parts is None:
        atom, total = (x, y) if x.parts is None else (y, x)
        if atom in set(leaves((total,))):
            block((total,), why)
            return
        if atom.block:
            block((total,), atom.block)
        atom.same = total
    else:
        _join_parts(x, (y,), why)
        x, y = representative(x), representative(y)
        if x is not y and x.factors is None and y.factors is None:
            x.same = y


def regroup(dims: Sequence[Dim], sizes: Sequence[int], why: Block) -> list[Dim]:
    """The dims of a view: the same positions in the same order, under new brackets.

    Factors that the new brackets cut are split.  Dimensions whose factors have no common
    refinement with the new sizes are blocked with `why`; the others are not affected.
    """
    queue = [axis for dim in dims for axis in resolve(dim)]
    if prod(sizes) == 0 or any(axis.size == 0 for axis in queue):
        return [fresh(n, why) for n in sizes]
    out: list[Dim] = []
    pending = list(sizes)
    other_length = prod(sizes) != size(tuple(queue)) and any(n >= SYMBOLIC for n in sizes)
    while pending:
        taken = _take(queue, pending[0], why)
        if taken is not None:
            out.append(taken)
            pending.pop(0)
            continue
        group = _group_of_other_length if other_length else _smallest_group
        axes, count = group(queue, pending)
        block(tuple(queue[:axes]), why)
        out += [fresh(n, why) for n in pending[:count]]
        del queue[:axes], pending[:count]
        other_length = False
    block(tuple(queue), why)
    return out


def _group_of_other_length(queue: Sequence[Axis], pending: Sequence[int]) -> tuple[int, int]:
    """How many old factors and new sizes come before what both sides end with.

    Lengths that only the input makes equal differ at the generic point.  What comes before the
    first of them is equal on both sides, and what follows the last of them is, too, so it is the
    same positions.
    """
    axes, count, width, n = len(queue), len(pending), 1, 1
    best = (axes, count)
    while True:
        if width <= n and axes and queue[axes - 1].size < SYMBOLIC:
            axes -= 1
            width *= queue[axes].size
        elif width > n and count and pending[count - 1] < SYMBOLIC:
            count -= 1
            n *= pending[count]
        else:
            return best
        if width == n:
            best = (axes, count)


def _take(queue: list[Axis], n: int, why: Block) -> Dim | None:
    """Take factors of product `n` from the front, splitting the last; None (and nothing) if not."""
    plan, width = 0, 1
    while width < n:
        if plan == len(queue):
            return None
        factor = queue[plan].size
        missing = n // width
        if missing % factor == 0:
            width, plan = width * factor, plan + 1
        elif factor % missing == 0:
            _make_product(queue[plan], missing, why)
            before = resolve(tuple(queue[:plan]))  # the same axis may come more than once
            queue[:], plan = [*before, *resolve(tuple(queue[plan:]))], len(before)
        else:
            return None
    taken = tuple(queue[:plan])
    del queue[:plan]
    return taken


def _smallest_group(queue: Sequence[Axis], pending: Sequence[int]) -> tuple[int, int]:
    """The fewest old factors and new sizes from the front that have the same product."""
    n, count, width, axes = pending[0], 1, 1, 0
    while n != width:
        if width < n and axes < len(queue):
            width, axes = width * queue[axes].size, axes + 1
        elif count < len(pending):
            n, count = n * pending[count], count + 1
        else:
            return len(queue), len(pending)
    return axes, count
