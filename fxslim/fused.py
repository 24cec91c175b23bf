"""Rules that are functions: operators that are a whole attention."""

from __future__ import annotations

from torch import fx

from fxslim import graph
from fxslim.axes import Dim, fresh, size
from fxslim.calls import Call, Dims
from fxslim.notation import broadcast, joined

__all__ = ["attention", "flex_attention"]


def attention(call: Call) -> list[Dims]:
    """softmax(query keyᵀ · scale + mask) value; the default scale reads the width of a head.

    query (..., heads, q, e), key (..., heads, k, e), value (..., heads, k, v), mask (..., q, k).
    With `enable_gqa` the query's heads are (KV heads, query heads per KV head).
    """
    batch, rows, length, width = _attended(call, grouped=call.arguments["enable_gqa"])
    if call.arguments["attn_mask"] is not None:
        mask = call.dims("attn_mask")
        batch = broadcast(batch, mask[:-2], call)
        rows, length = joined(rows, mask[-2], call), joined(length, mask[-1], call)
    call.reads(length, "is normalised over all of it")
    if call.arguments["is_causal"]:
        call.reads(rows, "masks each position by its number")
    if call.arguments["scale"] is None:
        call.reads(width, "scales by its width")
    return [(*batch, rows, call.dims("value")[-1])]


def flex_attention(call: Call) -> list[Dims]:
    """softmax(score_mod(query keyᵀ · scale)) value, where mask_mod is true.

    query (batch, heads, q, e), key (batch, KV heads, k, e), value (batch, KV heads, k, v).  Both
    functions are graphs over the numbers of batch, head, query and key.  What they use is read as a
    whole, and so are heads that they tell apart or for which the blocks of the mask differ.
    """
    (batch, heads), rows, length, _ = _attended(call, grouped=True)
    call.reads(rows, "masks it in blocks")
    call.reads(length, "is normalised over all of it")
    *blocks, mask_mod = call.arguments["block_mask"]
    scored, masked = _used(call.arguments["score_mod"])[1:], _used(mask_mod)
    others = call.tensors()[3:]
    tables = [call.operand(node) for node in blocks if node in others]
    for d, dim in enumerate((batch, heads)):
        if scored[d] or masked[d] or any(size(dims[d]) > 1 for dims in tables):
            call.reads(dim, "scores each position of it by its number")
    for node in others:
        for dim in call.operand(node):
            call.reads(dim)
    statistics: list[Dims] = [
        (batch, heads, rows) if len(shape) == 3 else tuple(map(fresh, shape))
        for shape in call.shapes[1:]
    ]
    return [(batch, heads, rows, call.dims("value")[-1]), *statistics]


def _used(function: fx.Node) -> list[bool]:
    """Which of its arguments a function uses."""
    return [bool(node.users) for node in graph.subgraph(function).find_nodes(op="placeholder")]


def _attended(call: Call, *, grouped: bool) -> tuple[Dims, Dim, Dim, Dim]:
    """(batch, query length, key length, width) of query keyᵀ, whose width is summed over."""
    query, key, value = call.dims("query"), call.dims("key"), call.dims("value")
    if grouped:
        key, value = (_spread(call, query, dims) for dims in (key, value))
    batch = broadcast(broadcast(query[:-2], key[:-2], call), value[:-2], call)
    width = joined(query[-1], key[-1], call)
    for name in ("query", "key"):
        call.contracts(call.arguments[name], len(call.dims(name)) - 1, width)
    return batch, query[-2], joined(key[-2], value[-2], call), width


def _spread(call: Call, query: Dims, dims: Dims) -> Dims:
    """Keys or values with each KV head repeated for its group of query heads."""
    times = size(query[-3]) // size(dims[-3])
    return (*dims[:-3], joined(query[-3], (*dims[-3], *fresh(times)), call), *dims[-2:])
