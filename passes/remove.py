"""What is left of a contraction over nothing: zeros, or the bias alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxslim import graph
from fxslim.analysis import AxisMap
from fxslim.axes import Dim, Keep, narrowed_size, resolve, size
from fxslim.calls import Dims
from fxslim.errors import PlanError

__all__ = ["remove_empty"]


def remove_empty(axes: AxisMap, keep: Keep) -> None:
    """Replace every contraction whose operands have become empty by its value.

    What fed it is dead code then.  A sum of nothing is zero, so that is what the product adds to
    its bias; and where there is no bias, nothing is added to the residual stream.
    """
    if all(keep.values()):
        return
    for node, contractions in axes.contractions.items():
        if any(narrowed_size(c.dim, keep) == 0 for c in contractions):
            if any(narrowed_size(dim, keep) == 0 for dim in axes.of(node)):
                continue  # itself part of what goes
            _replace(axes, node, keep)


def _replace(axes: AxisMap, node: fx.Node, keep: Keep) -> None:
    dims = axes.of(node)
    contracted = {c.operand for c in axes.contractions[node]}
    added = [n for n in graph.tensor_inputs(node) if n not in contracted]
    with node.graph.inserting_before(node):
        sizes = [_size_of(axes, node, dim, keep) for dim in dims]
        if added:
            value = _expanded(axes, node, added[0], dims, sizes)
        else:
            like = node.meta["val"]
            value = node.graph.call_function(
                torch.ops.aten.full.default,
                (sizes, 0),
                {"dtype": like.dtype, "device": like.device},
            )
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


def _size_of(axes: AxisMap, node: fx.Node, dim: Dim, keep: Keep) -> Any:
    """The size of `dim` as an argument: a number, or read from an earlier tensor that has it."""
    wanted = narrowed_size(dim, keep)
    if not graph.is_symbolic(wanted):
        return wanted
    for earlier in axes.program.graph.nodes:
        if earlier is node:
            break
        if graph.is_tensor(earlier):
            sizes = graph.shape(earlier.meta["val"])
            if wanted in sizes and size(dim) == wanted:
                at = sizes.index(wanted)
                read = node.graph.call_function(torch.ops.aten.sym_size.int, (earlier, at))
                read.meta["val"] = earlier.meta["val"].shape[at]
                return read
    raise PlanError(
        f"cannot remove all heads of the attention before {graph.user_name(node)}: no earlier "
        "tensor has the length of its result; keep at least one head there (min_heads=1)"
    )
