"""What the passes share: a graph pass on `torch.fx`, and the surgery they are made of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from fxslim.analysis import AxisMap
from fxslim.axes import Axis, leaves, resolve, size
from fxslim.calls import Dims
from fxslim.graph import attribute, fake_mode_of, is_symbolic

__all__ = [
    "GraphPass",
    "Isolated",
    "check_analysed",
    "eliminate_dead_code",
    "forget_unused",
    "infer_shapes",
    "isolate",
]


class GraphPass(PassBase):
    """A pass that returns a new program and leaves the one that came in as it is.

    Unlike its base it checks the *result*: the graph is linted and recompiled before it goes out.
    """

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass; raises `TypeError` where it is given anything but a `GraphModule`."""
        if not isinstance(graph_module, fx.GraphModule):
            raise TypeError(
                f"{type(self).__name__} takes a torch.fx.GraphModule (see fxslim.capture), "
                f"not {type(graph_module).__name__}"
            )
        result = self.call(graph_module)
        result.graph_module.graph.lint()
        result.graph_module.recompile()
        return result

    @abstractmethod
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Return a transformed copy of `graph_module` and whether it differs."""


def check_analysed(axis_map: AxisMap, program: fx.GraphModule) -> None:
    """Refuse a program other than the one that the axes are of."""
    if axis_map.program is not program:
        raise ValueError(
            "the pass was given the axes of another program: locate or analyse the one that it "
            "runs on, and make the pass anew"
        )


class Isolated:
    """A tensor whose merged (symbolic x static) dimensions are split apart for an operation."""

    def __init__(self, node: fx.Node, dims: Dims, split: list[tuple[int, int]]) -> None:
        self.node, self.dims, self._split = node, dims, split

    def merged(self, result: fx.Node) -> fx.Node:
        """`result`, shaped as `node` is, with the dimensions merged again."""
        graph = result.graph
        for first, count in reversed(self._split):
            last = first + count - 1
            flatten = torch.ops.aten.flatten.using_ints
            result = graph.call_function(flatten, (result, first, last))
        return result


def isolate(node: fx.Node, dims: Dims, axes: Iterable[Axis]) -> Isolated:
    """Split every dimension of `node` in which `axes` are merged with a symbolic length."""
    wanted, graph = set(axes), node.graph
    out: list[Any] = []
    split: list[tuple[int, int]] = []
    for dim in dims:
        factors = resolve(dim)
        lengths = [is_symbolic(axis.size) for axis in factors]
        if not (any(lengths) and set(leaves(dim)) & wanted):
            out.append(dim)
            continue
        first, last = lengths.index(True), len(lengths) - lengths[::-1].index(True)
        parts = [p for p in (factors[:first], factors[first:last], factors[last:]) if p]
        sizes = [-1 if any(is_symbolic(a.size) for a in part) else size(part) for part in parts]
        unflatten = torch.ops.aten.unflatten.int
        node = graph.call_function(unflatten, (node, len(out), sizes))
        split.append((len(out), len(parts)))
        out += parts
    return Isolated(node, tuple(out), split)


def infer_shapes(program: fx.GraphModule) -> None:
    """Infer a fake tensor for every node that has none."""
    mode = fake_mode_of(n.meta.get("val") for n in program.graph.nodes)
    assert mode is not None, "a program without fake tensors in node.meta['val']"
    with mode, torch.no_grad(), enable_python_dispatcher():
        for node in program.graph.nodes:
            if "val" in node.meta:
                continue
            if node.op == "get_attr":
                value = attribute(program, str(node.target))
                if isinstance(value, torch.Tensor):  # and not a higher-order operator's graph
                    node.meta["val"] = mode.from_tensor(value, static_shapes=True)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
                node.meta["val"] = node.target(*args, **kwargs)


def eliminate_dead_code(program: fx.GraphModule) -> None:
    """Remove nodes without users, except inputs, and operators that write or assert.

    A random operator whose result nobody reads goes too, which `torch.fx` by itself would keep.
    """
    program.graph.eliminate_dead_code(_must_stay)


def _must_stay(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output") or node.target is torch._assert:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        return schema.is_mutable or not schema.returns
    return node.op == "call_module" or bool(node.op == "call_function" and node.is_impure())


def forget_unused(program: fx.GraphModule) -> None:
    """Drop parameters and buffers that no node reads any more."""
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    for name, module in list(program.named_modules()):
        for own in [*module._parameters, *module._buffers]:
            if f"{name}.{own}".lstrip(".") not in read:
                delattr(module, own)
    program.delete_all_unused_submodules()
