"""Symbolic lengths as arguments: read from tensors that stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import reduce
from operator import mul
from typing import Any

import torch
from torch import fx

from fxslim import graph
from fxslim.axes import Dim, resolve, size
from fxslim.calls import Dims
from fxslim.errors import PlanError
from fxslim.positions import Keep, narrowed_size

__all__ = ["narrow_length", "read_length"]


def narrow_length(
    node: fx.Node,
    dim: Dim,
    keep: Keep,
    dims_of: Callable[[fx.Node], Dims],
    empty: Collection[fx.Node] = (),
) -> Any:
    """The narrow size of `dim` as an argument of `node`: a number, or read before it.

    Nothing is read from what is `empty`.

    Raises:
        PlanError: no tensor before `node` has that length.
    """
    wanted = narrowed_size(dim, keep)
    if not graph.is_symbolic(wanted):
        return wanted
    read, factors = read_length(node, wanted, keep, dims_of, empty), resolve(dim)
    if read is None and len(factors) > 1:
        sizes = [narrow_length(node, (factor,), keep, dims_of, empty) for factor in factors]
        return reduce(lambda a, b: _product(node, a, b), sizes)
    if read is None:
        raise PlanError(
            f"cannot narrow {graph.user_name(node)}: no earlier tensor has a length that it needs "
            "without the heads before it; keep at least one of them (min_heads=1)"
        )
    return read


def _product(node: fx.Node, a: Any, b: Any) -> Any:
    made = node.graph.call_function(mul, (a, b))
    made.meta["val"] = mul(*(x.meta["val"] if isinstance(x, fx.Node) else x for x in (a, b)))
    return made


def read_length(
    node: fx.Node,
    wanted: int,
    keep: Keep,
    dims_of: Callable[[fx.Node], Dims],
    empty: Collection[fx.Node] = (),
) -> fx.Node | None:
    """The length `wanted`, read before `node` from a dimension that stays as it is."""
    for earlier in node.graph.nodes:
        if earlier is node:
            break
        if graph.is_tensor(earlier) and earlier not in empty:
            dims = dims_of(earlier)
            staying = (at for at, dim in enumerate(dims) if narrowed_size(dim, keep) == size(dim))
            at = next((at for at in staying if size(dims[at]) == wanted), None)
            if at is not None:
                read = node.graph.call_function(torch.ops.aten.sym_size.int, (earlier, at))
                read.meta["val"] = earlier.meta["val"].shape[at]
                return read
    return None
