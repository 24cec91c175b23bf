"""The analysis: one forward walk that finds out what every dimension of every tensor is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from fxslim import graph
from fxslim.axes import Axis, Block, Dim, block, fresh, members, resolve, size
from fxslim.calls import Call, Contraction, Dims, RuleMismatch
from fxslim.rules import row_for

__all__ = ["AxisMap", "Use", "analyse"]

Use = tuple[fx.Node, fx.Node]
"""(user, operand): one place where a value is used."""


@dataclass(frozen=True)
class Select:
    """How an operand is selected from where it is used.

    Attributes:
        along: a dimension that is one axis there, whatever its factors.
        times: how often the operator repeats each of that dimension's positions.
    """

    along: int | None = None
    times: int = 1

    def of(self, dims: Dims) -> Selected:
        """The same factors with identities of their own; along the dimension, one for all."""
        seen = (
            fresh(size(dim) * self.times)
            if d == self.along
            else tuple(Axis(axis.size) for axis in resolve(dim))
            for d, dim in enumerate(dims)
        )
        return Selected(tuple(seen), self)


@dataclass(frozen=True)
class Selected:
    """The dims of an operand as a use sees them that selects from it."""

    dims: Dims
    how: Select


@dataclass
class AxisMap:
    """What every dimension is made of.

    Attributes:
        dims: for each node, the dims of each of its tensor results.
        contractions: for each node that sums over axes, the operands and factors it sums over.
        selected: for each use at which heads are selected rather than shared, what is selected from
            there.
        unruled: nodes whose operator has no rule, or whose rule did not fit.
        paired: lengths that are the same positions, though only the input makes them equal.
    """

    program: fx.GraphModule
    dims: dict[fx.Node, list[Dims]] = field(default_factory=dict)
    contractions: dict[fx.Node, list[Contraction]] = field(default_factory=dict)
    selected: dict[Use, Selected] = field(default_factory=dict)
    unruled: list[fx.Node] = field(default_factory=list)
    paired: list[tuple[Dim, Dim]] = field(default_factory=list)

    def of(self, node: fx.Node) -> Dims:
        """The dims of a node's (first) result."""
        return self.dims[node][0] if self.dims.get(node) else ()

    def seen_by(self, user: fx.Node, operand: fx.Node) -> Dims:
        """The dims of `operand` as `user` sees them."""
        selected = self.selected.get((user, operand))
        return self.of(operand) if selected is None else selected.dims

    def axes(self, node: fx.Node) -> set[Axis]:
        """The axes, leaves and sums, that any result of `node` carries."""
        return {axis for dims in self.dims.get(node, []) for dim in dims for axis in members(dim)}

    def same_positions(self, dim: Dim) -> set[Axis]:
        """The axes, leaves and sums, of `dim` and of the lengths that it is paired with."""
        found = set(members(dim))
        pairs = [set(members((*a, *b))) for a, b in self.paired]
        while further := [pair for pair in pairs if pair & found and not pair <= found]:
            found = found.union(*further)
        return found

    def on(self, program: fx.GraphModule, copy: Mapping[fx.Node, fx.Node]) -> AxisMap:
        """The same axes on a copy of the program."""
        return AxisMap(
            program,
            {copy[node]: dims for node, dims in self.dims.items()},
            {
                copy[node]: [replace(c, operand=copy[c.operand]) for c in contractions]
                for node, contractions in self.contractions.items()
            },
            {(copy[user], copy[node]): found for (user, node), found in self.selected.items()},
            [copy[node] for node in self.unruled],
            self.paired,
        )

    def call(self, node: fx.Node) -> Call:
        """The call of `node`, as its rule sees it."""
        return Call(
            node,
            lambda operand: self.seen_by(node, operand),
            graph.arguments(node),
            [graph.shape(value) for value in _results(node)],
        )


def _results(node: fx.Node) -> list[torch.Tensor]:
    """The tensors that `node` computes, in order."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def analyse(program: fx.GraphModule, select_at: Mapping[Use, Select] | None = None) -> AxisMap:
    """Walk `program` once and return its axis map.

    At the uses in `select_at` the operand shares no axis with its other uses: narrowing selects
    from it there.

    Raises:
        TypeError, ValueError: `program` is not what `fxslim.capture` returns.
    """
    _check_captured(program)
    axis_map = AxisMap(program)
    tensors: dict[int, list[Dims]] = {}
    operands: dict[fx.Node, dict[fx.Node, Select]] = {}
    for (user, operand), select in (select_at or {}).items():
        operands.setdefault(user, {})[operand] = select
    for node in program.graph.nodes:
        for operand, select in operands.get(node, {}).items():
            axis_map.selected[node, operand] = select.of(axis_map.of(operand))
            for dim in axis_map.of(operand):
                block(dim, Block("selects from it as a whole", node.name))
        if node.op == "get_attr" and graph.is_tensor(node):
            tensor = graph.attribute(program, node.target)
            known = tensors.setdefault(id(tensor), _fresh_results(node, None))
            axis_map.dims[node] = known
        elif node.op == "placeholder":
            axis_map.dims[node] = _fresh_results(
                node, Block("is a size of the graph's input", node.name)
            )
        elif node.op == "output":
            _block_outputs(axis_map, node)
        elif node.op == "call_function":
            _visit(axis_map, node)
    return axis_map


def _check_captured(program: fx.GraphModule) -> None:
    if not isinstance(program, fx.GraphModule):
        raise TypeError(f"a program is what fxslim.capture returns, not {type(program).__name__}")
    for node in program.graph.nodes:
        calls_module = node.op in ("call_module", "call_method")
        if calls_module or (node.op == "placeholder" and "val" not in node.meta):
            raise ValueError(
                f"the graph of {type(program).__name__} is no captured program: {node.name} has no "
                "shape; fxslim.capture(module, example_inputs) makes it one"
            )


def _fresh_results(node: fx.Node, blocked: Block | None) -> list[Dims]:
    return [tuple(fresh(n, blocked) for n in graph.shape(v)) for v in _results(node)]


def _block_outputs(axis_map: AxisMap, node: fx.Node) -> None:
    for operand in graph.tensor_inputs(node):
        for dims in axis_map.dims.get(operand, []):
            for dim in dims:
                block(dim, Block("is a size of the graph's output", operand.name))


def _visit(axis_map: AxisMap, node: fx.Node) -> None:
    """Give `node` its dims: by its row, or, where there is none, by refusing what it touches."""
    results = _results(node)
    if graph.operator_name(node) == "getitem" and node.args[0] in axis_map.dims:
        source, item = node.args[0], node.args[1]
        axis_map.dims[node] = [_item(axis_map, source, item)]  # type: ignore[arg-type]
        return
    if not results:
        return
    row = row_for(node) if isinstance(node.target, torch._ops.OperatorBase) else None
    reason = f"{graph.operator_name(node)} has no rule"
    if row is not None:
        call = axis_map.call(node)
        try:
            dims = [_at_size(d, shape, call) for d, shape in _paired(row.rule(call), call)]
        except RuleMismatch as mismatch:
            reason = f"the rule of {graph.operator_name(node)} does not fit: {mismatch}"
        else:
            axis_map.dims[node] = dims
            if call.contracted:
                axis_map.contractions[node] = call.contracted
            axis_map.paired += call.paired
            return
    _refuse(axis_map, node, Block(reason, node.name, unruled=graph.operator_name(node)))


def _paired(dims: list[Dims], call: Call) -> Iterator[tuple[Dims, tuple[int, ...]]]:
    """The dims that a rule gives with the shapes that PyTorch gives, where their ranks agree."""
    if [len(d) for d in dims] != [len(shape) for shape in call.shapes]:
        raise RuleMismatch("it gives other ranks than PyTorch")
    return zip(dims, call.shapes, strict=True)


def _at_size(dims: Dims, shape: tuple[int, ...], call: Call) -> Dims:
    """`dims` at PyTorch's sizes: lengths that only the input makes equal become new ones."""
    out = []
    for dim, n in zip(dims, shape, strict=True):
        if size(dim) != n and not (graph.is_symbolic(size(dim)) or graph.is_symbolic(n)):
            raise RuleMismatch(f"it gives {size(dim)} positions where PyTorch gives {n}")
        out.append(dim if size(dim) == n else fresh(n, call.why("is a length of the input")))
    call.paired.extend((old, new) for old, new in zip(dims, out, strict=True) if old is not new)
    return tuple(out)


def _item(axis_map: AxisMap, source: fx.Node, item: int) -> Dims:
    """The dims of one of several results (only tensors are counted)."""
    values = source.meta["val"]
    before = [v for v in values[:item] if isinstance(v, torch.Tensor)]
    return axis_map.dims[source][len(before)]


def _refuse(axis_map: AxisMap, node: fx.Node, why: Block) -> None:
    axis_map.unruled.append(node)
    for operand in graph.tensor_inputs(node):
        for dims in axis_map.dims.get(operand, []):
            for dim in dims:
                block(dim, why)
    axis_map.dims[node] = _fresh_results(node, why)
