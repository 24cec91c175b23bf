"""Rules that are functions: operators that rearrange, cut, build or index dimensions.

Each takes a `Call` and returns the dims of its results.  Everything here is about positions: which
position of a result is which position of an operand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from torch import fx

from fxslim import graph
from fxslim.axes import Dim, cut, fresh, regroup, side_by_side, size
from fxslim.calls import Call, Dims, RuleMismatch
from fxslim.notation import broadcast, joined

__all__ = [
    "concatenate",
    "create",
    "cut_out",
    "elementwise",
    "expand",
    "first_against_all",
    "halve",
    "like_first",
    "meshgrid",
    "others_read",
    "pad",
    "permute",
    "read_everything",
    "reads",
    "reduce",
    "repeat",
    "repeat_interleave",
    "replaced",
    "reverse",
    "select",
    "select_scatter",
    "slice_scatter",
    "sliced",
    "spatial",
    "split",
    "stack",
    "sum_over",
    "transpose",
    "unbind",
    "unfold",
    "view",
    "view_as",
]


def replaced(dims: Dims, position: int, *new: Dim) -> Dims:
    """`dims` with `new` in place of one of them."""
    return (*dims[:position], *new, *dims[position + 1 :])


def _new(call: Call, shape: Sequence[int], why: str) -> Dims:
    return tuple(fresh(n, call.why(why)) for n in shape)


# ------------------------------------------------------------------- the same, element by element


def elementwise(call: Call) -> list[Dims]:
    """All operands and all results share their dims, broadcast from the right."""
    dims: Dims = ()
    for node in call.tensors():
        dims = broadcast(dims, call.operand(node), call)
    return [dims] * len(call.shapes)


def like_first(call: Call) -> list[Dims]:
    """The results are shaped as the first operand; what else there is gives a type or a seed."""
    return [call.operand(call.tensors()[0])] * len(call.shapes)


def reads(name: str) -> Callable[[Call], list[Dims]]:
    """All operands share their dims; the dimensions that the argument names are read as a whole."""

    def rule(call: Call) -> list[Dims]:
        (dims, *_) = elementwise(call)
        for position in call.axes(name, next(iter(call.arguments))):
            call.reads(dims[position])
        return [
            dims if tuple(map(size, dims)) == shape else _swap_sizes(call, dims, shape)
            for shape in call.shapes
        ]

    return rule


def _swap_sizes(call: Call, dims: Dims, shape: tuple[int, ...]) -> Dims:
    """`dims`, with new dimensions where the sizes differ (the operator made those)."""
    if len(dims) != len(shape):
        raise RuleMismatch(f"{len(dims)} dimensions in, {len(shape)} out")
    why = call.why("is made by the operator")
    return tuple(d if size(d) == n else fresh(n, why) for d, n in zip(dims, shape, strict=True))


def others_read(call: Call) -> list[Dims]:
    """All operands run together; every dimension but `dim` is read as a whole (weight norm)."""
    (dims, *_) = elementwise(call)
    for position, dim in enumerate(dims):
        if position != int(call.arguments["dim"]) % len(dims):
            call.reads(dim)
    return [dims] * len(call.shapes)


def read_everything(call: Call) -> list[Dims]:
    """No position of a result is a position of an operand: all is blocked, knowingly."""
    for node in call.tensors():
        for dim in call.operand(node):
            call.reads(dim)
    return [_new(call, shape, "depends on everything the operator read") for shape in call.shapes]


def first_against_all(call: Call) -> list[Dims]:
    """Each element of the first operand compared with all of the others (isin, bucketize)."""
    first, *others = call.tensors()
    for node in others:
        for dim in call.operand(node):
            call.reads(dim)
    return [call.operand(first)] * len(call.shapes)


def spatial(rank: int) -> Callable[[Call], list[Dims]]:
    """(batch, channels, `rank` positions): pooling and resizing mix positions within a channel."""

    def rule(call: Call) -> list[Dims]:
        dims = call.operand(call.tensors()[0])
        kept = len(dims) - rank
        for dim in dims[kept:]:
            call.reads(dim)
        return [(*dims[:kept], *_new(call, s[kept:], "resampled")) for s in call.shapes]

    return rule


# ---------------------------------------------------------------------- new brackets, new order


def view(call: Call) -> list[Dims]:
    """The same positions in the same order under new brackets: view, reshape, squeeze, ..."""
    dims = call.operand(call.tensors()[0])
    why = call.why("regroups it across its factors")
    if call.arguments.get("dtype") is not None:  # elements of another width, within the last one
        return [(*dims[:-1], *regroup(dims[-1:], shape[-1:], why)) for shape in call.shapes]
    return [tuple(regroup(dims, shape, why)) for shape in call.shapes]


def view_as(call: Call) -> list[Dims]:
    """The first operand under the second's brackets; the two run together from there on."""
    (dims,) = view(call)
    return [broadcast(dims, call.operand(call.tensors()[1]), call)]


def reverse(call: Call) -> list[Dims]:
    """All dimensions in the opposite order."""
    return [call.dims("self")[::-1]]


def permute(call: Call) -> list[Dims]:
    """Dimensions in the order that `dims` gives."""
    dims = call.dims("self")
    return [tuple(dims[d] for d in call.axes("dims"))]


def transpose(call: Call) -> list[Dims]:
    """Two dimensions swapped; the last two where none are named."""
    dims = list(call.dims("self"))
    if len(dims) > 1:
        named = "dim0" in call.arguments
        a, b = (call.axis("dim0"), call.axis("dim1")) if named else (len(dims) - 2, len(dims) - 1)
        dims[a], dims[b] = dims[b], dims[a]
    return [tuple(dims)]


def expand(call: Call) -> list[Dims]:
    """Unit dimensions repeated: each repetition is a new axis along which nothing varies."""
    dims, shape = call.operand(call.tensors()[0]), call.shapes[0]
    padded: Dims = (*((),) * (len(shape) - len(dims)), *dims)
    return [tuple(d if size(d) == n else fresh(n) for d, n in zip(padded, shape, strict=True))]


def repeat(call: Call) -> list[Dims]:
    """Each dimension tiled: the number of the tile is a new outer factor."""
    dims, shape = call.dims("self"), call.shapes[0]
    padded: Dims = (*((),) * (len(shape) - len(dims)), *dims)
    return [tuple((*fresh(n // max(size(d), 1)), *d) for d, n in zip(padded, shape, strict=True))]


def repeat_interleave(call: Call) -> list[Dims]:
    """Each position of `dim` repeated: the number of the copy is a new inner factor."""
    uneven = len(call.tensors()) > 1
    if uneven or call.arguments.get("dim") is None:
        return read_everything(call)
    dims, position = call.dims("self"), call.axis()
    times = call.shapes[0][position] // max(size(dims[position]), 1)
    return [replaced(dims, position, (*dims[position], *fresh(times)))]


# --------------------------------------------------------------------------------- cut and paste


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
    pieces = _pieces(call, dims[position], [shape[position] for shape in call.shapes])
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
    """Tensors on top of each other along a new dimension, whose positions are told apart."""
    position = call.number("dim") % len(call.shapes[0])
    nodes = call.tensors()
    rest: Dims = ()
    for node in nodes:
        rest = broadcast(rest, call.operand(node), call)
    return [(*rest[:position], side_by_side([()] * len(nodes)), *rest[position:])]


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


# ----------------------------------------------------------------------------- reducing, creating


def reduce(call: Call) -> list[Dims]:
    """`dim` (all where there is none) read as a whole, and gone or a unit after it."""
    return _reduced(call, contract=False)


def sum_over(call: Call) -> list[Dims]:
    """`dim` (all where there is none) summed over."""
    return _reduced(call, contract=True)


def _reduced(call: Call, *, contract: bool) -> list[Dims]:
    node = call.tensors()[0]
    dims = call.operand(node)
    over = call.axes(tensor=next(iter(call.arguments)))
    for position in over:
        if contract:
            call.contracts(node, position)
        else:
            call.reads(dims[position])
    kept = tuple(d for i, d in enumerate(dims) if i not in over)
    units = tuple(() if i in over else d for i, d in enumerate(dims))
    return [kept if len(shape) == len(kept) else units for shape in call.shapes]


def create(call: Call) -> list[Dims]:
    """A tensor made from nothing but sizes and numbers."""
    return [tuple(fresh(n) for n in shape) for shape in call.shapes]


def meshgrid(call: Call) -> list[Dims]:
    """Each result varies along one of the one-dimensional operands."""
    lines = [call.operand(node)[0] if call.operand(node) else () for node in call.tensors()]
    if call.arguments.get("indexing") == "xy" and len(lines) > 1:
        lines[0], lines[1] = lines[1], lines[0]
    return [tuple(lines)] * len(call.shapes)
