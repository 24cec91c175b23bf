"""Rules that are functions: operators that rearrange, cut, build or index dimensions.

Each takes a `Call` and returns the dims of its results.  Everything here is about positions: which
position of a result is which position of an operand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fxslim.axes import Dim, fresh, size
from fxslim.calls import Call, Dims, RuleMismatch
from fxslim.notation import broadcast
from fxslim.refine import regroup

__all__ = [
    "create",
    "elementwise",
    "expand",
    "extremum",
    "first_against_all",
    "into_windows",
    "like_first",
    "meshgrid",
    "others_read",
    "out_of_windows",
    "permute",
    "read_everything",
    "reads",
    "reduce",
    "repeat",
    "repeat_interleave",
    "replaced",
    "reverse",
    "spatial",
    "sum_over",
    "transpose",
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


def into_windows(call: Call) -> list[Dims]:
    """(..., channels, height, width): each channel's windows of positions become channels."""
    dims = call.operand(call.tensors()[0])
    at = len(dims) - 3
    for dim in dims[at + 1 :]:
        call.reads(dim)
    (shape,) = call.shapes
    (window,) = _new(call, [shape[at] // size(dims[at])], "puts the positions of windows there")
    return [(*dims[:at], (*dims[at], *window), *_new(call, shape[at + 1 :], "counts its windows"))]


def out_of_windows(call: Call) -> list[Dims]:
    """The inverse: each channel's windows are put back, and added where they overlap."""
    dims, (shape,) = call.operand(call.tensors()[0]), call.shapes
    at = len(shape) - 3
    sizes = [shape[at], size(dims[at]) // shape[at]]
    channels, window = regroup([dims[at]], sizes, call.why("groups its channels"))
    for dim in (window, *dims[at + 1 :]):
        call.reads(dim)
    return [(*dims[:at], channels, *_new(call, shape[at + 1 :], "is made of windows"))]


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


# ----------------------------------------------------------------------------- reducing, creating


def reduce(call: Call) -> list[Dims]:
    """`dim` (all where there is none) read as a whole, and gone or a unit after it."""
    return _reduced(call, contract=False)


def extremum(call: Call) -> list[Dims]:
    """Two tensors element by element; of one, `dim` (all where there is none) read as a whole."""
    return elementwise(call) if len(call.tensors()) == 2 else reduce(call)


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
