"""Lifting: weights of a narrow program as inputs, made narrow there or beforehand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from fxslim.graph import add_constant
from fxslim.passes.base import forget_unused
from fxslim.passes.narrow import Selections
from fxslim.program import Program, copy_program

__all__ = ["lifted", "without_data"]


def lifted(
    slim: fx.GraphModule,
    weights: Mapping[str, int],
    narrow: Mapping[str, Selections],
    *,
    inside: bool,
) -> Program:
    """A copy of `slim` that takes dense weights as inputs again.

    Args:
        slim: what `Narrow` made of a program that was traced from Dynamo's graph.
        weights: the names of weights that are inputs of it, with the numbers of the inputs.
        narrow: what was selected of the weights that it narrowed.
        inside: narrow those in the graph, so that gradients reach the dense ones; else they stay
            attributes of the copy.
    """
    program, _ = copy_program(slim)
    places = program.graph.find_nodes(op="placeholder")
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in weights or (name in narrow and not inside):
            continue
        dense = places[weights[name]]
        chosen = _select(node, dense, narrow.get(name, ()))
        node.replace_all_uses_with(chosen)
        program.graph.erase_node(node)
    forget_unused(program)
    program.recompile()
    return program


def _select(before: fx.Node, dense: fx.Node, chosen: Selections) -> fx.Node:
    """`dense` index-selected in the graph."""
    for dimension, index in chosen:
        kept = add_constant(before, index.to(dense.meta["val"].device))
        with before.graph.inserting_before(before):
            select = torch.ops.aten.index_select.default
            dense = before.graph.call_function(select, (dense, dimension, kept), {})
        dense.meta["val"] = before.meta["val"]
    return dense


def without_data(tensor: torch.Tensor) -> torch.Tensor:
    """A stand-in of the same kind and shape, so that a program does not keep weights alive."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
