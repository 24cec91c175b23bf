"""Rules that are functions: operators that put tensors together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import fx

from fxslim import graph
from fxslim.axes import Dim, members, resolve, size
from fxslim.calls import Call, Dims
from fxslim.notation import broadcast
from fxslim.refine import beginning_with_unit, regroup, side_by_side
from fxslim.views import replaced

__all__ = ["concatenate", "put_along", "stack"]

_PUT = {"cat", "concat", "stack"}


def put_along(pieces: Iterable[fx.Node], rank: int) -> int | None:
    """Along which of `rank` dimensions pieces of a tensor are put together, if used only for that.

    What is done to a piece alone, and keeps its shape, may come before.  A stack has a dimension of
    its own: then it is the last one, with which a position can go.
    """
    together = list(dict.fromkeys(map(_put, pieces)))
    if rank == 0 or len(together) != 1 or together[0] is None:
        return None
    is_stack = graph.operator_name(together[0]) == "stack"
    return rank - 1 if is_stack else int(graph.arguments(together[0])["dim"]) % rank


def _put(piece: fx.Node) -> fx.Node | None:
    """The concatenation or stack that a piece ends in, by itself up to there."""
    shape = graph.shape(piece.meta["val"])
    while len(piece.users) == 1:
        (user,) = piece.users
        if graph.operator_name(user) in _PUT:
            return user
        if not graph.is_tensor(user) or graph.shape(user.meta["val"]) != shape:
            return None
        piece = user
    return None


def concatenate(call: Call) -> list[Dims]:
    """Tensors side by side along `dim`; elsewhere they run together."""
    rank = len(call.shapes[0])
    tensors = [call.operand(node) for node in call.tensors()]
    tensors = [dims for dims in tensors if len(dims) == rank]  # an empty list-like is skipped
    position = call.number("dim") % rank
    along = _cut_along(call, position)
    if along is None:
        return [_settled(call, _beside(call, tensors, position))]
    return [_settled(call, _transposed(call, tensors, along, position))]


def _beside(call: Call, tensors: Sequence[Dims], position: int) -> Dims:
    """Tensors side by side along a dimension."""
    rest: Dims = ()
    for dims in tensors:
        rest = broadcast(rest, replaced(dims, position, ()), call)
    return replaced(rest, position, side_by_side([dims[position] for dims in tensors]))


def _settled(call: Call, dims: Dims) -> Dims:
    """`dims` in which no unit is a dimension by itself any more, as it may be in a piece."""
    for dim in dims:
        if size(dim) == 1:
            call.reads(dim, "has it for a single position")
    return tuple(() if size(dim) == 1 else dim for dim in dims)


def _transposed(call: Call, pieces: Sequence[Dims], along: int, position: int) -> Dims:
    """What one dimension was cut `along`, put together at another `position`.

    The number of the piece moves from the one dimension to the other, before its own positions.
    """
    whole, width = side_by_side([dims[along] for dims in pieces]), size(pieces[0][along])
    number, inner = regroup([whole], [len(pieces), width], call.why("puts it side by side"))
    rest: Dims = ()
    for dims in pieces:
        rest = broadcast(rest, replaced(dims, along, inner), call)
    return replaced(rest, position, (*number, *rest[position]))


def _cut_along(call: Call, position: int) -> int | None:
    """The dimension, other than `position`, whose equal pieces the operands are, if they are."""
    nodes = call.tensors()
    sources, shapes = set(map(_cut_from, nodes)), {graph.shape(n.meta["val"]) for n in nodes}
    (source, *others), (piece, *unequal) = sources, shapes
    if source is None or others or unequal or len(nodes) == 1:
        return None
    whole = graph.shape(source.meta["val"])
    if len(whole) != len(piece):
        return None
    cut = (d for d in range(len(whole)) if d != position and whole[d] == len(nodes) * piece[d])
    return next(cut, None)


def _cut_from(node: fx.Node) -> fx.Node | None:
    """The tensor that a piece was cut from, if no bound of it depends on the input."""
    name = graph.operator_name(node)
    if name not in ("getitem", "slice") or any(isinstance(n, fx.Node) for n in node.args[1:]):
        return None
    cut = node if name == "slice" else node.all_input_nodes[0]
    return next(iter(graph.tensor_inputs(cut)), None)


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
    return [_settled(call, (*rest[:position], side_by_side(units), *rest[position:]))]


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
