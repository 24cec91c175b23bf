"""Rules that are functions: operators that cut dimensions into pieces, or write over them.

A position that is cut out alone has to stay, unless all of its tensor goes with it; for that it is
a unit.  It is where what is cut out is put together again, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import fx

from fxslim import graph
from fxslim.axes import Dim, fresh, resolve, size
from fxslim.calls import Call, Dims, RuleMismatch
from fxslim.notation import broadcast, joined
from fxslim.refine import cut, regroup, side_by_side
from fxslim.together import put_along
from fxslim.views import replaced

__all__ = [
    "cut_out",
    "halve",
    "pad",
    "select",
    "select_scatter",
    "slice_scatter",
    "sliced",
    "split",
    "unbind",
    "unfold",
]


def _pieces(call: Call, dim: Dim, widths: Sequence[int], *, units: bool = False) -> list[Dim]:
    """`dim` cut into pieces of the given widths, some of which may be empty, or units."""
    if sum(widths) != size(dim) and any(map(graph.is_symbolic, (size(dim), *widths))):
        call.reads(dim, "cuts it at lengths that depend on the input")
        return [fresh(width, call.why("cut by the input")) for width in widths]
    if sum(widths) != size(dim):
        raise RuleMismatch(f"pieces of {list(widths)} positions do not make up {size(dim)}")
    ends = list(accumulate(widths))
    bounds = sorted({end for end in ends if 0 < end < size(dim)})
    pieces = iter(cut(dim, bounds, call.why("cuts through its inner factors"), units=units))
    return [next(pieces) if width else fresh(0) for width in widths]


def _numbers(dim: Dim) -> Dim:
    """The factors of `dim` whose size the input does not change."""
    return tuple(axis for axis in resolve(dim) if not graph.is_symbolic(axis.size))


def cut_out(call: Call, dim: Dim, start: int, width: int, *, units: bool = False) -> Dim:
    """`width` positions of `dim` from `start` on."""
    if start + width > size(dim):  # a symbolic width, which only the input makes fit
        call.reads(dim, "cuts it at a length that depends on the input")
        return fresh(width, call.why("cut at a length of its own"))
    return _pieces(call, dim, [start, width, size(dim) - start - width], units=units)[1]


def sliced(call: Call) -> list[Dims]:
    """A piece of `dim`, or every step-th position of it."""
    dims, position = call.dims("self"), call.axis()
    dim = dims[position]
    length, width, step = size(dim), call.shapes[0][position], call.number("step")
    start = call.bound("start", length, 0)
    whole = width == length and call.arguments["start"] in (None, 0)
    if _depends_on_input(call) and not whole:  # heads folded into the batch end at its multiple
        call.reads(_numbers(dim), "cuts it at a length that depends on the input")
        if not graph.is_symbolic(length):
            return [replaced(dims, position, fresh(width, call.why("cut by the input")))]
    if width == length:
        return [dims]
    if step != 1:
        return [replaced(dims, position, _every(call, dim, start, width, step))]
    if width == 0:
        return [replaced(dims, position, fresh(0))]
    put = put_along([call.node], len(dims)) is not None
    return [replaced(dims, position, cut_out(call, dim, start, width, units=put))]


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
    dim, rest = dims[position], replaced(dims, position)
    if isinstance(call.arguments["index"], fx.Node):
        call.reads(dim, "picks a position that depends on the input")
    elif dim:
        along = put_along([call.node], len(rest))
        index = call.number("index") % size(dim)
        unit = cut_out(call, dim, index, 1, units=along is not None)
        return [_going_with(unit, rest, along)]
    return [rest]


def unbind(call: Call) -> list[Dims]:
    """Every position of `dim` by itself."""
    dims, position = call.dims("self"), call.axis()
    rest = replaced(dims, position)
    along = put_along(call.node.users, len(rest))
    units = _pieces(call, dims[position], [1] * len(call.shapes), units=along is not None)
    return [_going_with(unit, rest, along) for unit in units]


def _going_with(unit: Dim, dims: Dims, along: int | None) -> Dims:
    """`dims` that are there as long as `unit` is, which begins the dimension `along`."""
    return dims if along is None else replaced(dims, along, (*unit, *dims[along]))


def split(call: Call) -> list[Dims]:
    """`dim` cut into pieces, whose widths the results' shapes tell: split, chunk, ..."""
    dims, position = call.dims("self"), call.axis()
    widths = [shape[position] for shape in call.shapes]
    given = call.arguments.get("split_sizes", call.arguments.get("split_size"))
    if not isinstance(given, (list, tuple)) and any(map(graph.is_symbolic, widths)):
        numbers = _numbers(dims[position])
        if len(set(widths)) > 1 or size(numbers) % len(widths):  # else equal at all lengths
            call.reads(numbers, "cuts it at lengths that depend on the input")
    put = put_along(call.node.users, len(dims)) is not None
    pieces = _pieces(call, dims[position], widths, units=put)
    return [replaced(dims, position, piece) for piece in pieces]


def halve(call: Call) -> list[Dims]:
    """Two halves of `dim` combined element by element (gated linear unit)."""
    dims, position = call.dims("self"), call.axis()
    half = size(dims[position]) // 2
    a, b = _pieces(call, dims[position], [half, half])
    return [replaced(dims, position, joined(a, b, call))]


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
