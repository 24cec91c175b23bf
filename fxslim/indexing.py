"""Rules that are functions: operators that pick or write positions by an index.

An index that is computed picks positions that nobody can foresee, so the indexed dimension is read
as a whole.  A constant index is known: it cuts the dimension, or repeats it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import fx

from fxslim import graph
from fxslim.axes import Dim, fresh, size
from fxslim.calls import Call, Dims, RuleMismatch
from fxslim.notation import broadcast, joined
from fxslim.pieces import cut_out
from fxslim.refine import side_by_side
from fxslim.views import read_everything, replaced

__all__ = ["gather", "index", "index_copy", "index_put", "index_select", "scatter"]

_MOST_RUNS = 64
"""A constant index with more runs of consecutive positions is treated as one that is computed."""


def _picked(call: Call, dim: Dim, index: fx.Node, most: int = _MOST_RUNS) -> Dim | None:
    """The positions of `dim` that a constant index picks; None if unknown or too scattered."""
    given = graph.constant(index)
    known = _listed(call, dim, given, most) if given and dim else None
    if known is not None:
        call.reads(call.operand(index)[0], "is an index, which changes with what it picks from")
    return known


def _listed(call: Call, dim: Dim, given: Sequence[int], most: int) -> Dim | None:
    """The positions `given` of `dim`; None if they are too scattered."""
    n = size(dim)
    positions, times = [position % n for position in given], max(len(given) // n, 1)
    if positions == [position for position in range(n) for _ in range(times)]:
        return (*dim, *fresh(times))
    if positions == list(range(n)) * times:
        return (*fresh(times), *dim)
    runs = _runs(positions)
    if len(runs) > most or len(set(positions)) < len(positions):
        return None
    return side_by_side([cut_out(call, dim, start, width) for start, width in runs])


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive positions as (start, width)."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and position == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((position, 1))
    return runs


def index(call: Call) -> list[Dims]:
    """Advanced indexing: indexed dimensions are read, the index tensors' dims take their place.

    One dimension indexed by a constant is cut instead, or repeated.
    """
    if _masks(call):
        return read_everything(call)
    dims, indices = call.dims("self"), call.arguments["indices"]
    if len([node for node in indices if node is not None]) == 1:
        at = next(i for i, node in enumerate(indices) if node is not None)
        known = _picked(call, dims[at], indices[at])
        if known is not None:
            return [replaced(dims, at, known)]
    return [_placed(call)[0]]


def _placed(call: Call) -> tuple[Dims, Dims]:
    """The dims of what the indices pick, and of the index tensors together."""
    found, at = _indexed(call)
    pairs = zip_longest(call.dims("self"), call.arguments["indices"])
    others = [dim for dim, node in pairs if node is None]
    return (*others[:at], *found, *others[at:]), found


def _masks(call: Call) -> list[fx.Node]:
    """Indices that are masks: such a one stands for as many dimensions as it has."""
    nodes = [node for node in call.arguments["indices"] if node is not None]
    return [node for node in nodes if node.meta["val"].dtype in (torch.bool, torch.uint8)]


def _indexed(call: Call) -> tuple[Dims, int]:
    """The dims of all index tensors together, and at which position they come."""
    indices = call.arguments["indices"]
    positions = [i for i, node in enumerate(indices) if node is not None]
    found: Dims = ()
    for position in positions:
        call.reads(call.dims("self")[position], "picks positions of it by an index")
        found = broadcast(found, call.operand(indices[position]), call)
    adjacent = positions == list(range(positions[0], positions[-1] + 1))
    return found, positions[0] if adjacent else 0


def index_put(call: Call) -> list[Dims]:
    """Values written at indices: indexed dimensions are read, the others run together."""
    dims, values = call.dims("self"), call.dims("values")
    if _masks(call):
        return [_masked_put(call)]
    placed, found = _placed(call)
    if len(values) > len(placed):
        raise RuleMismatch("the values have more dimensions than the place they are put at")
    broadcast(placed, values, call)
    for dim in found:
        call.reads(dim, "writes it at positions by an index")
    return [dims]


def _masked_put(call: Call) -> Dims:
    """One value put under a mask is element by element; more than one are dealt out in order."""
    indices, dims, values = call.arguments["indices"], call.dims("self"), call.dims("values")
    if any(values) or len(call.tensors()) != 3:
        read_everything(call)
        return dims
    (mask,) = _masks(call)
    rest = len(dims) - indices.index(mask) - len(call.operand(mask))
    return broadcast(dims, (*call.operand(mask), *((),) * rest), call)


def index_select(call: Call) -> list[Dims]:
    """Positions of `dim` picked by a one-dimensional index.

    Where that is known and leaves some out, they run along the index, which narrows, and not along
    what is picked from: so a program that was narrowed once, and selects from a bias that others
    share, can be narrowed again.
    """
    dims, position, picked = call.dims("self"), call.axis(), call.dims("index")
    if not dims:
        return [dims]
    known = _picked(call, dims[position], call.arguments["index"], most=0)
    if known is None:
        call.reads(dims[position], "picks positions of it by an index")
        known = picked[0] if picked else ()
    return [replaced(dims, position, known)]


def gather(call: Call) -> list[Dims]:
    """Along `dim` positions are picked, element by element along the other dimensions."""
    dims, chosen = call.dims("self"), call.dims("index")
    if not dims:
        return [chosen]
    position = call.axis()
    call.reads(dims[position], "picks positions of it by an index")
    for i, (dim, other) in enumerate(zip(dims, chosen, strict=True)):
        if i != position:
            _same_or_read(call, dim, other)
    return [chosen]


def _same_or_read(call: Call, dim: Dim, other: Dim) -> None:
    """Element by element where the sizes agree; where the index is smaller, both are read."""
    if size(dim) == size(other):
        joined(dim, other, call)
    else:
        call.reads(dim, "picks the first positions of it")
        call.reads(other, "picks the first positions of another dimension")


def index_copy(call: Call) -> list[Dims]:
    """Slices of `source` written at positions of `dim`; the other dimensions run together."""
    dims, source, position = call.dims("self"), call.dims("source"), call.axis()
    if len(source) != len(dims):
        return read_everything(call)
    for dim in (dims[position], source[position], *call.dims("index")):
        call.reads(dim, "writes it at positions by an index")
    rest = broadcast(replaced(dims, position, ()), replaced(source, position, ()), call)
    return [replaced(rest, position, dims[position])]


def scatter(call: Call) -> list[Dims]:
    """Along `dim` values are written at positions, element by element along the others."""
    dims, position = call.dims("self"), call.axis()
    if not dims:
        return read_everything(call)
    call.reads(dims[position], "writes positions of it by an index")
    for node in call.tensors()[1:]:
        for i, (dim, other) in enumerate(zip(dims, call.operand(node), strict=True)):
            if i != position:
                _same_or_read(call, dim, other)
            else:
                call.reads(other, "writes it at positions by an index")
    return [dims]
