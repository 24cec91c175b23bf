"""Rules that are functions: operators that cut dimensions into pieces, or put them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from torch import fx

from fxslim import graph
from fxslim.axes import Dim, fresh, members, resolve, size
from fxslim.calls import Call, Dims, RuleMismatch
from fxslim.notation import broadcast, joined
from fxslim.refine import beginning_with_unit, cut, regroup, side_by_side
from fxslim.views import replaced

__all__ = [
    "concatenate",
    "cut_out",
    "halve",
    "pad",
    "select",
    "select_scatter",
    "slice_scatter",
    "sliced",
    "split",
    "stack",
    "unbind",
    "unfold",
]


def _pieces(call: Call, dim: Dim, widths: Sequence[int]) -> list[Dim]:
    """`dim` cut into pieces of the given widths, some of which may be empty."""
    if sum(widths) != size(dim) and any(map(graph.is_symbolic, (size(dim), *widths))):
        call.reads(dim, "cuts it at lengths that depend on the input")
        return [fresh(width, call.why("cut by the input")) for width in widths]
    if sum(widths) != size(dim):
        raise RuleMismatch(f"pieces of {list(widths)} positions do not make up {size(dim)}")
    ends = list(accumulate(widths))
    bounds = sorted({end for end in ends if 0 < end < size(dim)})
    pieces = iter(cut(dim, bounds, call.why("cuts through its inner factors")))
    return [next(pieces) if width else fresh(0) for width in widths]


def cut_out(call: Call, dim: Dim, start: int, width: int) -> Dim:
    """`width` positions of `dim` from `start` on."""
    if start + width > size(dim):  # a symbolic width, which only the input makes fit
        call.reads(dim, "cuts it at a length that depends on the input")
        return fresh(width, call.why("cut at a length of its own"))
    return _pieces(call, dim, [start, width, size(dim) - start - width])[1]


def sliced(call: Call) -> list[Dims]:
    """A piece of `dim`, or every step-th position of it."""
    dims, position = call.dims("self"), call.axis()
    dim = dims[position]
    length, width, step = size(dim), call.shapes[0][position], call.number("step")
    start = call.bound("start", length, 0)
    if _depends_on_input(call) and not graph.is_symbolic(length):
        call.reads(dim, "cuts it at a length that depends on the input")
        return [replaced(dims, position, fresh(width, call.why("cut by the input")))]
    if width == length:
        return [dims]
    if step != 1:
        return [replaced(dims, position, _every(call, dim, start, width, step))]
    if width == 0:
        return [replaced(dims, position, fresh(0))]
    return [replaced(dims, position, cut_out(call, dim, start, width))]


def _depends_on_input(call: Call) -> bool:
    return any(isinstance(call.arguments[name], fx.Node) for name in ("start", "end"))


def _every(call: Call, dim: Dim, start: int, width: int, step: int) -> Dim:
    if width * step != size(dim) or start >= step:
        call.reads(dim, "takes every other position of it")
        return fresh(width, call.why("takes every other position"))
    outer, inner = regroup([dim], [width, step], call.why("takes every other position of it"))
    cut_out(call, inner, start, 1)
    return outer


def select(call: Call) -> list[Dims]:
    """One position of `dim`, which disappears."""
    dims, position = call.dims("self"), call.axis()
    if isinstance(call.arguments["index"], fx.Node):
        call.reads(dims[position], "picks a position that depends on the input")
    elif dims[position]:
        index = call.number("index") % size(dims[position])
        cut_out(call, dims[position], index, 1)
    return [replaced(dims, position)]


def unbind(call: Call) -> list[Dims]:
    """Every position of `dim` by itself."""
    dims, position = call.dims("self"), call.axis()
    _pieces(call, dims[position], [1] * size(dims[position]))
    return [replaced(dims, position)] * len(call.shapes)


def split(call: Call) -> list[Dims]:
    """`dim` cut into pieces, whose widths the results' shapes tell: split, chunk, ..."""
    dims, position = call.dims("self"), call.axis()
    widths = [shape[position] for shape in call.shapes]
    given = call.arguments.get("split_sizes", call.arguments.get("split_size"))
    listed = isinstance(given, (list, tuple))
    if len(widths) > 1 and not listed and any(map(graph.is_symbolic, widths)):
        constant = tuple(a for a in resolve(dims[position]) if not graph.is_symbolic(a.size))
        call.reads(constant, "cuts it at lengths that depend on the input")
    pieces = _pieces(call, dims[position], widths)
    return [replaced(dims, position, piece) for piece in pieces]


def halve(call: Call) -> list[Dims]:
    """Two halves of `dim` combined element by element (gated linear unit)."""
    dims, position = call.dims("self"), call.axis()
    half = size(dims[position]) // 2
    a, b = _pieces(call, dims[position], [half, half])
    return [replaced(dims, position, joined(a, b, call))]


def concatenate(call: Call) -> list[Dims]:
    """Tensors side by side along `dim`; elsewhere they run together."""
    rank = len(call.shapes[0])
    tensors = [call.operand(node) for node in call.tensors()]
    tensors = [dims for dims in tensors if len(dims) == rank]  # an empty list-like is skipped
    position = call.number("dim") % rank
    rest: Dims = ()
    for dims in tensors:
        rest = broadcast(rest, replaced(dims, position, ()), call)
    return [replaced(rest, position, side_by_side([dims[position] for dims in tensors]))]


def stack(call: Call) -> list[Dims]:
    """Tensors on top of each other along a new dimension, whose positions are told apart.

    A position goes with all of its tensor, which begins with a unit where it is like no other.
    """
    position = call.number("dim") % len(call.shapes[0])
    operands = [call.operand(node) for node in call.tensors()]
    units: list[Dim] = [()] * len(operands)
    own = _dimension_of_its_own(operands)
    if own is not None:
        for number, dims in enumerate(operands):
            units[number], inner = beginning_with_unit(dims[own])
            operands[number] = replaced(dims, own, inner)
    rest: Dims = ()
    for dims in operands:
        rest = broadcast(rest, dims, call)
    return [(*rest[:position], side_by_side(units), *rest[position:])]


def _dimension_of_its_own(operands: Sequence[Dims]) -> int | None:
    """The last dimension that begins with axes of its own in each of several operands."""
    if len(operands) == 1:
        return None
    occurring = Counter(axis for dims in operands for dim in dims for axis in members(dim))
    for position in reversed(range(len(operands[0]))):
        found = [resolve(dims[position]) for dims in operands]
        first = [dim[:1] if dim and dim[0].size == 1 else dim for dim in found]
        own = all(dim and all(occurring[axis] == 1 for axis in members(dim)) for dim in first)
        if own and not any(graph.is_symbolic(size(dim)) for dim in found):
            return position
    return None


def pad(call: Call) -> list[Dims]:
    """New positions on both sides; unless they are a constant, the dimension is read."""
    out, why = list(call.dims("self")), call.why("padding")
    constant = call.arguments.get("mode", "constant") == "constant"
    amounts = call.arguments["pad"]
    for i, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
        position = len(out) - 1 - i
        dim, width = out[position], call.shapes[0][position]
        symbolic = isinstance(before, fx.Node) or isinstance(after, fx.Node)
        if symbolic or before < 0 or after < 0 or not (constant or before == after == 0):
            call.reads(dim, "pads or crops it by a length of its own")
            out[position] = fresh(width, why)
        else:
            out[position] = side_by_side([fresh(before, why), dim, fresh(after, why)])
    return [tuple(out)]


def unfold(call: Call) -> list[Dims]:
    """Sliding windows over `dimension`: a new last dimension holds the window."""
    dims, position = call.dims("self"), call.axis("dimension")
    call.reads(dims[position], "slides a window over it")
    steps, window = call.shapes[0][position], call.shapes[0][-1]
    why = call.why("slides a window")
    return [(*replaced(dims, position, fresh(steps, why)), fresh(window, why))]


def _written(call: Call, piece: Dim, source: Dims, position: int) -> list[Dims]:
    """The operand, after `source` was written over `piece` of its dimension `position`."""
    dims = call.dims("self")
    target = broadcast(replaced(dims, position, piece), source, call)
    return [replaced(target, position, dims[position])]


def slice_scatter(call: Call) -> list[Dims]:
    """`src` written over a slice of `self`."""
    dims, position = call.dims("self"), call.axis()
    dim, source = dims[position], call.dims("src")
    start = call.bound("start", size(dim), 0)
    width = size(source[position])
    if call.number("step") != 1:
        piece = _every(call, dim, start, width, call.number("step"))
    else:
        piece = cut_out(call, dim, start, width)
    return _written(call, piece, source, position)


def select_scatter(call: Call) -> list[Dims]:
    """`src` written over one position of `dim`."""
    dims, position, source = call.dims("self"), call.axis(), call.dims("src")
    cut_out(call, dims[position], call.number("index") % size(dims[position]), 1)
    return _written(call, (), (*source[:position], (), *source[position:]), position)
