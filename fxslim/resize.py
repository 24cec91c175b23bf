"""Shape constants after narrowing: each function re-derives one kind of argument from the axes.

Nothing is patched: the new value follows from what the dimensions are made of and which
coordinates stay.  Functions run after all axes are known, and before any size has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from operator import floordiv, mul
from typing import Any

import torch
from torch import fx

from fxslim import graph
from fxslim.axes import Dim, size
from fxslim.calls import Call, Dims
from fxslim.lengths import narrow_length
from fxslim.positions import Keep, kept_before, kept_positions, narrowed_size
from fxslim.refine import regroup

__all__ = [
    "Resize",
    "bounds",
    "constant_index",
    "groups",
    "position",
    "repeats",
    "result_sizes",
    "selections",
    "split_sizes",
    "times",
    "unflattened",
    "unit_dims",
]

Resize = Callable[[Call, list[Dims], Keep], None]
"""Rewrites the shape constants of a call, given the dims of its results and what stays."""


def _new_size(node: fx.Node, given: Any, dim: Dim, keep: Keep, *, infer: bool) -> Any:
    """The size argument for `dim`: a number, -1 where it may be inferred, or a computed one."""
    old, new = size(dim), narrowed_size(dim, keep)
    if old == new or given == -1:
        return given
    if not isinstance(given, fx.Node) or not graph.is_symbolic(new):
        return new
    if infer:
        return -1
    ratio = Fraction(new, old)
    with node.graph.inserting_before(node):
        part = _scalar(node, floordiv, given, ratio.denominator)
        return _scalar(node, mul, part, ratio.numerator)


def _scalar(node: fx.Node, function: Callable[[Any, Any], Any], a: fx.Node, b: int) -> fx.Node:
    if b == 1:
        return a
    made = node.graph.call_function(function, (a, b))
    made.meta["val"] = function(a.meta["val"], b)
    return made


def result_sizes(name: str, *, infer: bool = False) -> Resize:
    """The argument `name` lists the sizes of the result (view, expand, full, ...).

    With `infer`, -1 in it means 'what is left'.
    """

    def resize(call: Call, results: list[Dims], keep: Keep) -> None:
        given = call.arguments.get(name)
        if given is None:
            return
        dims, sizes = results[0], list(given)
        for i, dim in enumerate(dims):
            open_end = infer and -1 not in sizes
            sizes[i] = _new_size(call.node, sizes[i], dim, keep, infer=open_end)
        graph.set_argument(call.node, name, sizes)

    return resize


def unflattened(call: Call, results: list[Dims], keep: Keep) -> None:
    """`sizes` lists the factors that dimension `dim` is split into."""
    first, sizes = call.axis(), list(call.arguments["sizes"])
    dims = results[0][first : first + len(sizes)]
    new = [_new_size(call.node, n, d, keep, infer=False) for n, d in zip(sizes, dims, strict=True)]
    graph.set_argument(call.node, "sizes", new)


def split_sizes(call: Call, results: list[Dims], keep: Keep) -> None:
    """Whatever the spelling, a split along a narrowed dimension states the width of each piece.

    A symbolic width is computed from the one that is given.
    """
    dim = call.axis()
    if narrowed_size(call.dims("self")[dim], keep) == size(call.dims("self")[dim]):
        return
    widths = [narrowed_size(dims[dim], keep) for dims in results]
    if any(map(graph.is_symbolic, widths)):
        _split_at_symbols(call, [dims[dim] for dims in results], keep)
        return
    call.node.target = torch.ops.aten.split_with_sizes.default
    call.node.args, call.node.kwargs = (call.arguments["self"], widths, dim), {}


def _split_at_symbols(call: Call, pieces: list[Dim], keep: Keep) -> None:
    """The widths as they are listed, or read from what has them."""
    node = call.node
    given = call.arguments.get("split_sizes", call.arguments.get("split_size"))
    if isinstance(given, (list, tuple)):
        stated = zip(given, pieces, strict=True)
        widths = [_new_size(node, n, dim, keep, infer=False) for n, dim in stated]
    else:
        with node.graph.inserting_before(node):
            widths = [narrow_length(node, piece, keep, call.operand) for piece in pieces]
    node.target = torch.ops.aten.split_with_sizes.default
    node.args, node.kwargs = (call.arguments["self"], widths, call.axis()), {}


def bounds(call: Call, results: list[Dims], keep: Keep) -> None:
    """`start` and `end` count the positions that stay before them."""
    dim = call.dims("self")[call.axis()]
    length = size(dim)
    start, end = call.bound("start", length, 0), call.bound("end", length, length)
    step = call.number("step")
    if narrowed_size(dim, keep) == length or (start, end, step) == (0, length, 1):
        return
    if step == 1:
        start, end = kept_before(dim, keep, [start, end])
        graph.set_argument(call.node, "end", end)
    else:
        _, dim = regroup([dim], [length // step, step], call.why("takes every other position"))
        graph.set_argument(call.node, "end", None)
        graph.set_argument(call.node, "step", narrowed_size(dim, keep))
        (start,) = kept_before(dim, keep, [start])
    graph.set_argument(call.node, "start", start)


def position(call: Call, results: list[Dims], keep: Keep) -> None:
    """`index` counts the positions that stay before it."""
    dim = call.dims("self")[call.axis()]
    if narrowed_size(dim, keep) != size(dim):
        index = call.number("index") % size(dim)
        graph.set_argument(call.node, "index", *kept_before(dim, keep, [index]))


def selections(call: Call, results: list[Dims], keep: Keep) -> None:
    """What is unbound becomes selected, position by position, and is resized as that."""
    dim = call.dims("self")[call.axis()]
    for item in list(call.node.users) if narrowed_size(dim, keep) != size(dim) else ():
        item.target = torch.ops.aten.select.int
        item.args = (call.arguments["self"], call.axis(), item.args[1])


def repeats(call: Call, results: list[Dims], keep: Keep) -> None:
    """How often each dimension is tiled."""
    dims, given = call.dims("self"), list(call.arguments["repeats"])
    padded: Dims = (*((),) * (len(given) - len(dims)), *dims)
    for i, (before, after) in enumerate(zip(padded, results[0], strict=True)):
        given[i] = _times(before, after, keep, given[i])
    graph.set_argument(call.node, "repeats", given)


def times(call: Call, results: list[Dims], keep: Keep) -> None:
    """How often each position of `dim` is repeated."""
    dim = call.axis()
    before, after = call.dims("self")[dim], results[0][dim]
    given, length = call.arguments["repeats"], call.arguments["output_size"]
    if narrowed_size(after, keep) == size(after):
        return
    graph.set_argument(call.node, "repeats", _times(before, after, keep, given))
    if length is not None:
        length = _new_size(call.node, length, after, keep, infer=False)
        graph.set_argument(call.node, "output_size", length)


def _times(before: Dim, after: Dim, keep: Keep, given: Any) -> Any:
    """How often `before` is repeated in `after` once both are narrow; `given` if still as often."""
    new = narrowed_size(after, keep) // max(narrowed_size(before, keep), 1)
    return given if new == size(after) // max(size(before), 1) else new


def groups(channel_tensor: str, name: str) -> Resize:
    """The number of channel groups that stay, of the channels of `channel_tensor`."""

    def resize(call: Call, results: list[Dims], keep: Keep) -> None:
        old = call.number(name)
        channel = 1 if channel_tensor == "input" else 0
        dim = call.dims(channel_tensor)[channel]
        outer, _ = regroup([dim], [old, size(dim) // old], call.why("groups its channels"))
        graph.set_argument(call.node, name, narrowed_size(outer, keep))

    return resize


def unit_dims(call: Call, results: list[Dims], keep: Keep) -> None:
    """A squeeze names the dimensions that are units by themselves, not by narrowing."""
    dims = call.dims("self")
    asked = call.axes() if call.arguments.get("dim") != [] else []
    call.node.target = torch.ops.aten.squeeze.dims
    call.node.args = (call.arguments["self"], [i for i in asked if size(dims[i]) == 1])
    call.node.kwargs = {}


def constant_index(call: Call, results: list[Dims], keep: Keep) -> None:
    """A constant index counts the positions that stay before each one that it picks."""
    listed = call.arguments.get("indices")
    indices = [*((None,) * call.axis()), call.arguments["index"]] if listed is None else [*listed]
    at, *others = (i for i, node in enumerate(indices) if node is not None)
    given = graph.constant(indices[at])
    if others or given is None or not results[0]:
        return
    dim, result = call.dims("self")[at], results[0][at]
    if narrowed_size(dim, keep) == size(dim) and narrowed_size(result, keep) == size(result):
        return
    picked = [given[position] % size(dim) for position in kept_positions(result, keep)]
    new = kept_before(dim, keep, picked)
    device = call.node.meta["val"].device
    index = graph.add_constant(call.node, torch.tensor(new, dtype=torch.long, device=device))
    indices[at] = index
    name, value = ("index", index) if listed is None else ("indices", indices)
    graph.set_argument(call.node, name, value)
