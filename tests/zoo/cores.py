"""Count the attention cores of a graph without asking the library: what it should find.

A core is an SDPA call, or a softmax (or exponentials that are summed) whose input derives from a
product of two activations and whose result reaches another one. Written from the operators' names
alone, and none of it is shared with `fxslim`, so that the two can disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx

__all__ = ["count_cores"]

_SDPA = {"scaled_dot_product_attention"}
_SOFTMAX = {"softmax", "_softmax", "_safe_softmax", "special_softmax"}
_PRODUCTS = {"matmul", "mm", "bmm", "baddbmm", "addmm", "einsum", "linear"}
_ADDED_FIRST = {"baddbmm", "addmm"}
_VIEWS = {"t", "numpy_T", "mT", "transpose", "permute", "view", "reshape", "expand", "unsqueeze"}
_VIEWS |= {"squeeze", "slice", "select", "alias", "contiguous", "to", "_to_copy", "clone"}
_BARRIERS = {"embedding", "layer_norm", "rms_norm", "group_norm", "batch_norm", "grid_sampler"}
_BARRIERS |= {"conv1d", "conv2d", "conv3d", "convolution"} | _SOFTMAX | _SDPA

Neighbours = Callable[[fx.Node], Iterable[fx.Node]]


def count_cores(graph: fx.Graph) -> int:
    """The number of attention cores in a graph of ATen operators.

    >>> class Attention(torch.nn.Module):
    ...     def forward(self, q, k, v):
    ...         return torch.softmax(q @ k.mT, -1) @ v
    >>> inputs = tuple(torch.randn(2, 3, 5) for _ in range(3))
    >>> count_cores(torch.export.export(Attention(), inputs).graph)
    1
    """
    return sum(_is_core(node) for node in graph.nodes)


def _is_core(node: fx.Node) -> bool:
    if _operator(node) in _SDPA:
        return True
    return (
        (_operator(node) in _SOFTMAX or _is_summed_exponential(node))
        and _reaches_product(node, lambda n: n.all_input_nodes)
        and _reaches_product(node, lambda n: n.users)
    )


def _is_summed_exponential(node: fx.Node) -> bool:
    users = [
        user for n in (node, *node.users) if _operator(n) in ("exp", "mul") for user in n.users
    ]
    return _operator(node) == "exp" and any(_operator(user) == "sum" for user in users)


def _reaches_product(softmax: fx.Node, neighbours: Neighbours) -> bool:
    """Whether a walk from the softmax, through elementwise operators, meets two activations."""
    waiting, seen = list(neighbours(softmax)), set()
    while waiting:
        node = waiting.pop()
        if node in seen or _operator(node) in _BARRIERS:
            continue
        seen.add(node)
        if _operator(node) in _PRODUCTS:
            if not any(map(_is_parameter, _operands(node))):
                return True
            if not _mixes_heads(node):
                continue
        waiting += neighbours(node)
    return False


def _operator(node: fx.Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return node.target._schema.name.removeprefix("aten::").rstrip("_")


def _operands(product: fx.Node) -> list[fx.Node]:
    operands = [node for node in _flatten(product.args) if isinstance(node, fx.Node)]
    if _operator(product) in _ADDED_FIRST:
        del operands[0]
    return operands[:2]


def _flatten(arguments: Iterable[object]) -> Iterator[object]:
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from _flatten(argument)
        else:
            yield argument


def _is_parameter(node: fx.Node) -> bool:
    while _operator(node) in _VIEWS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


def _mixes_heads(product: fx.Node) -> bool:
    """A product with a parameter that keeps the sizes of the scores, as talking heads have it."""
    activations = [node for node in _operands(product) if not _is_parameter(node)]
    return len(activations) == 1 and _sizes(activations[0]) == _sizes(product)


def _sizes(node: fx.Node) -> list[str]:
    value = node.meta.get("val")
    return sorted(map(str, value.shape)) if isinstance(value, torch.Tensor) else []
