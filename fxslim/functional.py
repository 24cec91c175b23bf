"""The functional form of an exported program: operators that have a row, none in place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from fxslim.follow import closure
from fxslim.rules import row_for

__all__ = ["decompositions", "functional"]


def functional(exported: ExportedProgram) -> ExportedProgram:
    """The program without in-place operators, and in terms of operators that have a row.

    Only those without one are decomposed, if PyTorch knows how: linear, matmul, softmax and
    attention stay whole.
    """
    _detach_frozen(exported)
    table = decompositions(exported.graph)
    program: ExportedProgram = exported.run_decompositions(table)
    while more := decompositions(program.graph, table):
        table |= more
        program = program.run_decompositions(table)
    return program


def _detach_frozen(exported: ExportedProgram) -> None:
    """Detach what regions without gradients give, as decomposing takes the regions away."""
    learned = {*exported.graph_signature.inputs_to_parameters}
    for node in list(exported.graph.nodes):
        target = node.target
        if not isinstance(target, torch._ops.HigherOrderOperator) or node.args[0] is not False:
            continue
        if target._name != "wrap_with_set_grad_enabled":
            continue
        before = closure([node], lambda n: n.all_input_nodes)
        if not any(n.name in learned for n in before):
            continue
        for value in list(node.users):
            if value.target is operator.getitem and value.meta["val"].is_floating_point():
                _detach(value)
    exported.graph_module.recompile()


def _detach(value: fx.Node) -> None:
    """Let no gradient through a value."""
    with value.graph.inserting_after(value):
        detached = value.graph.call_function(torch.ops.aten.detach.default, (value,))
    detached.meta = dict(value.meta)
    value.replace_all_uses_with(detached, delete_user_cb=lambda user: user is not detached)


def decompositions(graph: fx.Graph, known: Collection[Any] = ()) -> dict[Any, Callable[..., Any]]:
    """PyTorch's decompositions of the operators that have no row, except those known."""
    unknown = {
        node.target
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and row_for(node) is None
        and not isinstance(node.meta.get("val"), torch.SymInt)
    }
    if not unknown:
        return {}
    table = torch.export.default_decompositions()
    return {op: table[op] for op in unknown if op in table and op not in known}
