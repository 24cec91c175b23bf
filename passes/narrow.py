"""Narrow: parameters lose the positions that a keep set leaves out, and the graph follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxslim import graph
from fxslim.analysis import AxisMap, Select
from fxslim.axes import Axis, leaves, size
from fxslim.calls import Dims
from fxslim.passes.base import (
    GraphPass,
    check_analysed,
    eliminate_dead_code,
    forget_unused,
    infer_shapes,
    isolate,
)
from fxslim.passes.remove import remove_empty
from fxslim.passes.shapes import check_shapes, narrow_shapes, unknowable
from fxslim.positions import Keep, kept_positions, narrowed_size
from fxslim.program import copy_program
from fxslim.rules import row_for

__all__ = ["Narrow", "Selections", "select", "selections_of"]

_AS_IT_IS = Select()

Selections = tuple[tuple[int, torch.Tensor], ...]
"""Dimensions of a tensor, each with a LongTensor of the positions that stay."""


@dataclass(frozen=True)
class Narrow(GraphPass):
    """Keep only some coordinates of some axes, everywhere.

    Before: a captured program and its axis map.  After: every parameter and buffer that carries an
    axis in `keep` is index-selected along it, shape constants are re-derived, and shapes inferred
    anew agree with the axis map.  Equal to masking the other coordinates with 0 at the operands of
    the contractions that end the axis.  An axis that keeps nothing goes with all that fed it.

    Attributes:
        axis_map: `fxslim.analysis.analyse` of the program that the pass is applied to.
        keep: free axes, each with the coordinates that stay, ascending.
    """

    axis_map: AxisMap
    keep: Keep

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Return the narrow program.

        Raises:
            ValueError: the axis map is of another program.
            VerificationError: a shape is not what the axis map says; nothing is returned.
        """
        check_analysed(self.axis_map, graph_module)
        slim, places = copy_program(graph_module)
        axes = self.axis_map.on(slim, places)
        touched = [node for node in axes.dims if _carries(axes, node, set(self.keep))]
        passed_over = unknowable(touched)
        for node in touched:
            self._resize(axes, node)
        for node in touched:
            self._select_after(axes, node)
        for user, operand in axes.selected:
            self._select_at(axes, user, operand)
        self._narrow_tensors(axes, [node for node in touched if node.op == "get_attr"])
        remove_empty(axes, self.keep)
        eliminate_dead_code(slim)
        forget_unused(slim)
        narrow_shapes(axes, self.keep, [node for node in touched if not _selected_from(node)])
        new = [node for node in slim.graph.nodes if "val" not in node.meta]
        infer_shapes(slim)
        checked = set(slim.graph.nodes) - passed_over
        check_shapes(slim, [node for node in (*touched, *new) if node in checked])
        return PassResult(slim, bool(touched))

    def _resize(self, axes: AxisMap, node: fx.Node) -> None:
        """Re-derive the shape constants of a call."""
        row = row_for(node) if node.op == "call_function" and axes.dims[node] else None
        if row is not None and row.resize is not None:
            row.resize(axes.call(node), axes.dims[node], self.keep)

    def _select_after(self, axes: AxisMap, node: fx.Node) -> None:
        """Select from a tensor whose values depend on the position (`arange`)."""
        row = row_for(node) if node.op == "call_function" else None
        if row is None or not row.by_position or not self._narrows(axes.of(node)):
            return
        users = list(node.users)
        picked = self._select(node, axes.of(node), before=node.next)
        for user in users:
            user.replace_input_with(node, picked)

    def _select_at(self, axes: AxisMap, user: fx.Node, operand: fx.Node) -> None:
        """Select from an operand that stays as wide as it is, where it is used."""
        selected = axes.selected[user, operand]
        if self._narrows(selected.dims):
            picked = self._select(operand, selected.dims, before=user, how=selected.how)
            user.replace_input_with(operand, picked)

    def _narrows(self, dims: Dims) -> bool:
        return any(leaf in self.keep for dim in dims for leaf in leaves(dim))

    def _select(
        self, node: fx.Node, dims: Dims, *, before: fx.Node, how: Select = _AS_IT_IS
    ) -> fx.Node:
        """Insert calls that index-select `node` along each dimension that narrows."""
        repeated = dims[how.along] if how.along is not None else None
        select, device = torch.ops.aten.index_select.default, node.meta["val"].device
        with before.graph.inserting_before(before):
            isolated = isolate(node, dims, self.keep)
            result = isolated.node
            for position, dim in enumerate(isolated.dims):
                if self._narrows((dim,)):
                    kept = torch.tensor(kept_positions(dim, self.keep), device=device)
                    if dim is repeated:
                        kept = kept // how.times
                    index = graph.add_constant(before, kept.long())
                    result = before.graph.call_function(select, (result, position, index))
            return isolated.merged(result)

    def _narrow_tensors(self, axes: AxisMap, nodes: list[fx.Node]) -> None:
        """Index-select parameters and buffers; tied ones once."""
        made: dict[int, torch.Tensor] = {}
        for node in nodes:
            target = str(node.target)
            old = graph.attribute(axes.program, target)
            if id(old) not in made:
                made[id(old)] = _narrowed(old, _selections(axes.of(node), self.keep))
            graph.set_attribute(axes.program, target, made.get(id(old), old))


def _selected_from(node: fx.Node) -> bool:
    """Whether `node` is made in full because its values depend on the position."""
    row = row_for(node) if node.op == "call_function" else None
    return row is not None and row.by_position


def _carries(axes: AxisMap, node: fx.Node, wanted: set[Axis]) -> bool:
    """Whether a result or an operand of `node` carries one of the axes."""
    return any(axes.axes(n) & wanted for n in _with_operands(node)) or any(
        leaf in wanted
        for operand in graph.tensor_inputs(node)
        for dim in axes.seen_by(node, operand)
        for leaf in leaves(dim)
    )


def _with_operands(node: fx.Node) -> Iterator[fx.Node]:
    yield node
    yield from graph.tensor_inputs(node)


def _selections(dims: Dims, keep: Keep) -> Selections:
    """The dimensions that narrow, each with the positions that stay."""
    narrow = [d for d, dim in enumerate(dims) if narrowed_size(dim, keep) != size(dim)]
    return tuple((d, torch.tensor(kept_positions(dims[d], keep)).long()) for d in narrow)


def selections_of(axes: AxisMap, keep: Keep) -> dict[str, Selections]:
    """For each parameter and buffer that narrows, by name, what stays of it."""
    read = axes.program.graph.find_nodes(op="get_attr")
    found = {str(node.target): _selections(axes.of(node), keep) for node in read}
    return {name: chosen for name, chosen in found.items() if chosen}


def select(tensor: torch.Tensor, chosen: Selections) -> torch.Tensor:
    """`tensor` index-selected along every dimension that narrows."""
    for dimension, index in chosen:
        tensor = tensor.index_select(dimension, index.to(tensor.device))
    return tensor


def _narrowed(tensor: torch.Tensor, chosen: Selections) -> torch.Tensor:
    """`tensor` without what goes, of its own kind."""
    value = select(tensor.detach(), chosen)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value
