"""Other inputs than the example: another batch and other lengths, where a program is dynamic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tests.zoo.reference import Call

__all__ = ["resized"]


def resized(program: fx.GraphModule, call: Call) -> dict[str, Call]:
    """The same call with another batch, and with other lengths, as far as the program is dynamic.

    Returns:
        Calls by what was changed: "batch" and "length"; without those that are static.
    """
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    if not _match(leaves, values):
        return {}
    symbols, batch = _symbols(values), _batch_symbols(values)
    calls = {}
    for label, step, changed in (
        ("batch", 1, [symbol for symbol in symbols if symbol in batch]),
        ("length", 3, [symbol for symbol in symbols if symbol not in batch]),
    ):
        sizes = {symbol: _other_size(symbols[symbol], step) for symbol in changed}
        if any(sizes[symbol] != symbols[symbol].node.hint for symbol in changed):
            new = [_resize(leaf, v, sizes) for leaf, v in zip(leaves, values, strict=True)]
            args, kwargs = pytree.tree_unflatten(new, spec)
            calls[label] = Call(args, kwargs)
    return calls


def _match(leaves: Sequence[object], values: Sequence[object]) -> bool:
    """Whether the placeholders are the leaves of the call, in this order."""
    return len(leaves) == len(values) and all(
        not isinstance(value, Tensor)
        or (isinstance(leaf, Tensor) and tuple(leaf.shape) == tuple(map(_hint, value.shape)))
        for leaf, value in zip(leaves, values, strict=True)
    )


def _hint(size: int | torch.SymInt) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _symbolic_sizes(values: Sequence[object]) -> Iterator[tuple[int, torch.SymInt]]:
    for value in values:
        sizes: Sequence[Any] = value.shape if isinstance(value, Tensor) else ()
        for dim, size in enumerate(sizes):
            if isinstance(size, torch.SymInt):
                yield dim, size


def _symbols(values: Sequence[object]) -> dict[Any, torch.SymInt]:
    """Every symbol that is a size by itself."""
    return {size.node.expr: size for _, size in _symbolic_sizes(values) if size.node.expr.is_symbol}


def _batch_symbols(values: Sequence[object]) -> set[Any]:
    """The symbols that are leading sizes, and as large as the first of these."""
    leading = [size.node for dim, size in _symbolic_sizes(values) if dim == 0]
    return {node.expr for node in leading if node.hint == leading[0].hint}


def _other_size(size: torch.SymInt, step: int) -> int:
    """Larger by `step`, or smaller by one where the program has an upper bound in the way."""
    hint: int = size.node.hint
    bounds = size.node.shape_env.var_to_range[size.node.expr]
    if hint + step <= bounds.upper:
        return hint + step
    return max(hint - 1, int(bounds.lower))


def _resize(leaf: Any, value: object, sizes: Mapping[Any, int]) -> Any:
    """Repeat or cut a tensor along its symbolic dimensions."""
    if not isinstance(leaf, Tensor) or not isinstance(value, Tensor):
        return leaf
    for dim, size in _symbolic_sizes([value]):
        old = leaf.shape[dim]
        new = int(size.node.expr.subs({**_unchanged(size, sizes), **sizes}))
        leaf = leaf.index_select(dim, torch.arange(new) % old)
    return leaf


def _unchanged(size: torch.SymInt, sizes: Mapping[Any, int]) -> dict[Any, int]:
    hints = size.node.shape_env.backed_var_to_val
    return {s: int(hints[s]) for s in size.node.expr.free_symbols if s not in sizes}
