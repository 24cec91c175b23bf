"""What is left of a contraction over nothing: zeros, or the bias alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from fxslim import graph
from fxslim.analysis import AxisMap
from fxslim.axes import resolve
from fxslim.calls import Dims
from fxslim.lengths import narrow_length, read_length
from fxslim.positions import Keep, narrowed_size

__all__ = ["remove_empty"]


def remove_empty(axes: AxisMap, keep: Keep) -> None:
    """Replace every contraction whose operands have become empty by its value.

    What fed it is dead code then.  A sum of nothing is zero, so that is what the product adds to
    its bias; and where there is no bias, nothing is added to the residual stream.  Where something
    empty lies beside something that stays, it is made from nothing.
    """
    if all(keep.values()):
        return
    tensors = filter(graph.is_tensor, axes.dims)
    empty = {node for node in tensors if _is_empty(axes.of(node), keep)}
    for node in empty:
        _read_sizes_elsewhere(axes, node, keep, empty)
    for node in [node for node in axes.dims if node not in empty]:
        contractions = axes.contractions.get(node, ())
        if any(narrowed_size(c.dim, keep) == 0 for c in contractions):
            _replace(axes, node, keep, empty)
            empty.add(node)  # dead now, so that no length is read from it
            continue
        if node.target in (torch.ops.aten.cat.default, torch.ops.aten.stack.default):
            _leave_out(node, empty)
        for operand in graph.tensor_inputs(node):
            if operand in empty and operand.op == "call_function":
                with node.graph.inserting_before(node):
                    sizes = [
                        narrow_length(node, dim, keep, axes.of, empty) for dim in axes.of(operand)
                    ]
                    node.replace_input_with(operand, _zeros(operand, sizes))


def _leave_out(node: fx.Node, empty: Collection[fx.Node]) -> None:
    """Leave what is empty out of what lies together, and a concatenation of what stays alone."""
    staying = [tensor for tensor in graph.arguments(node)["tensors"] if tensor not in empty]
    graph.set_argument(node, "tensors", staying)
    alone = len(staying) == 1 and node.target is torch.ops.aten.cat.default
    if alone and staying[0].meta["val"].dtype == node.meta["val"].dtype:
        node.replace_all_uses_with(staying[0])


def _is_empty(dims: Dims, keep: Keep) -> bool:
    return any(narrowed_size(dim, keep) == 0 for dim in dims)


def _zeros(like: fx.Node, sizes: list[Any]) -> fx.Node:
    kind = {"dtype": like.meta["val"].dtype, "device": like.meta["val"].device}
    return like.graph.call_function(torch.ops.aten.full.default, (sizes, 0), kind)


def _read_sizes_elsewhere(
    axes: AxisMap, node: fx.Node, keep: Keep, empty: Collection[fx.Node]
) -> None:
    """Read lengths from tensors that stay, so that `node` is not needed for its shape alone."""
    for user in list(node.users):
        value = user.meta.get("val")
        if isinstance(value, torch.SymInt):
            with node.graph.inserting_before(user):
                read = read_length(user, graph.generic_size(value), keep, axes.of, empty)
            if read is not None:
                user.replace_all_uses_with(read)


def _replace(axes: AxisMap, node: fx.Node, keep: Keep, empty: Collection[fx.Node]) -> None:
    dims = axes.of(node)
    contracted = {c.operand for c in axes.contractions[node]}
    added = [n for n in graph.tensor_inputs(node) if n not in contracted]
    with node.graph.inserting_before(node):
        sizes = [narrow_length(node, dim, keep, axes.of, empty) for dim in dims]
        value = _expanded(axes, node, added[0], dims, sizes) if added else _zeros(node, sizes)
    for user in list(node.users):
        other = None if added else _other_summand(user, node)
        if other is not None and graph.shape(other.meta["val"]) == graph.shape(user.meta["val"]):
            user.replace_all_uses_with(other)
        else:
            user.replace_input_with(node, value)


def _expanded(axes: AxisMap, node: fx.Node, bias: fx.Node, dims: Dims, sizes: list[Any]) -> fx.Node:
    """The bias alone, in the shape of the result."""
    own = [resolve(dim) for dim in axes.of(bias)]
    last = [resolve(dim) for dim in dims]
    trailing = 0
    if len(own) == 1 and own[0] != last[-1]:
        trailing = len(last) - 1 - last.index(own[0])
    value = bias
    for _ in range(trailing):
        value = node.graph.call_function(torch.ops.aten.unsqueeze.default, (value, -1))
    return node.graph.call_function(torch.ops.aten.expand.default, (value, sizes))


def _other_summand(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """What `user` adds to `node`, if all it does is add two tensors."""
    if user.target is not torch.ops.aten.add.Tensor or user.kwargs or len(user.args) != 2:
        return None
    a, b = user.args
    other = b if a is node else a
    return other if isinstance(other, fx.Node) and graph.is_tensor(other) else None
