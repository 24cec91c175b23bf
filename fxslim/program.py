"""The program: a `GraphModule` that keeps its outputs' types when it is copied or pickled."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

__all__ = ["Program", "copy_graph", "copy_program", "flat_inputs"]


class Program(fx.GraphModule):
    """A captured, masked or slim model: a graph of ATen calls under the model's own names.

    `torch.fx` pickles a module as source code and traces that again, which turns a model's output
    classes into plain dicts; a `Program` pickles its graph.  It also remembers which buffers are
    not saved.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "Program") -> None:
        super().__init__(root, graph, class_name)
        for target, _ in root.named_buffers():
            _keep_persistence(root, self, target)

    def keep_attributes(self, attributes: dict[str, Any]) -> None:
        """Set plain attributes that copies keep, too."""
        if attributes:
            self.meta["attributes"] = {**self.meta.get("attributes", {}), **attributes}
        for name, value in attributes.items():
            setattr(self, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        root = copy.deepcopy(_root(self), memo)
        graph, places = copy_graph(self.graph)
        for old, new in places.items():
            new.meta = copy.copy(old.meta)
        return _assemble(root, graph, copy.deepcopy(self.meta, memo), type(self).__name__)

    def __reduce__(self) -> tuple[Callable[..., Program], tuple[Any, ...]]:
        nodes = [
            (n.op, _named(n.target), *map_aggregate((n.args, n.kwargs), _named), n.name)
            for n in self.graph.nodes
        ]
        name = type(self).__name__
        return _unpickle, (_root(self), nodes, self.graph._codegen, self.meta, name)


@dataclass(frozen=True)
class _Reference:
    """A node's name in a pickled graph."""

    name: str


@dataclass(frozen=True)
class _Path:
    """Where `torch` holds what cannot be pickled: ``ops``, ``aten``, ``add``, ``Tensor``."""

    names: tuple[str, ...]

    def follow(self) -> Any:
        return functools.reduce(getattr, self.names, torch)


def _named(value: Any) -> Any:
    """What to pickle for a target or an argument: nodes, operators and formats by their names."""
    if isinstance(value, fx.Node):
        return _Reference(value.name)
    if isinstance(value, torch.memory_format):
        return _Path((str(value).removeprefix("torch."),))
    if isinstance(value, torch._ops.HigherOrderOperator):
        return _Path(("ops", "higher_order", value._name))
    if isinstance(value, torch._ops.OpOverload):
        return _Path(("ops", *value._schema.name.split("::"), value._overloadname))
    return value


def _root(program: fx.GraphModule) -> nn.Module:
    """The parameters, buffers and submodules of a program, without its graph."""
    root = nn.Module()
    root._parameters, root._buffers = program._parameters, program._buffers
    root._modules = program._modules
    root._non_persistent_buffers_set = program._non_persistent_buffers_set
    root.training = program.training
    return root


def _assemble(root: nn.Module, graph: fx.Graph, meta: dict[str, Any], name: str) -> Program:
    program = Program(root, graph, name)
    program.meta = meta
    program.keep_attributes(meta.get("attributes", {}))
    program.train(root.training)
    return program


def _keep_persistence(root: nn.Module, program: Program, target: str) -> None:
    """A `GraphModule` is given buffers as plain attributes: say again which are not saved."""
    path, _, name = target.rpartition(".")
    if name in root.get_submodule(path)._non_persistent_buffers_set and _has(program, target):
        program.get_submodule(path)._non_persistent_buffers_set.add(name)


def _has(program: Program, target: str) -> bool:
    return any(name == target for name, _ in program.named_buffers())


def _unpickle(
    root: nn.Module, nodes: list[tuple[Any, ...]], codegen: Any, meta: dict[str, Any], name: str
) -> Program:
    graph = fx.Graph()
    graph._codegen = codegen
    made: dict[str, fx.Node] = {}

    def follow(value: Any) -> Any:
        if isinstance(value, _Reference):
            return made[value.name]
        return value.follow() if isinstance(value, _Path) else value

    for op, target, args, kwargs, own in nodes:
        call = map_aggregate((target, args, kwargs), follow)
        made[own] = graph.create_node(op, *call, name=own)
    return _assemble(root, graph, meta, name)


def copy_graph(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of `graph`, calling convention included, and where each node went."""
    new = fx.Graph()
    places: dict[fx.Node, fx.Node] = {}
    result: Any = new.graph_copy(graph, places, return_output_node=True)
    if result is not None:
        value, old = result
        places[old] = new.output(value, old.type)
        places[old].meta = copy.copy(old.meta)
    new._codegen = copy.copy(graph._codegen)
    return new, places


def copy_program(program: fx.GraphModule) -> tuple[Program, dict[fx.Node, fx.Node]]:
    """A program of its own graph that shares every tensor, and where each node went."""
    graph, places = copy_graph(program.graph)
    made = Program(program, graph, type(program).__name__)
    made.meta = {key: value for key, value in program.meta.items() if key != "fxslim"}
    made.keep_attributes(made.meta.get("attributes", {}))
    made.train(program.training)
    return made, places


def flat_inputs(
    program: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Any]:
    """What each placeholder of `program` gets in a call, in order.

    Raises:
        TypeError: the program does not take these inputs.
    """
    signature = inspect.signature(program.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        given = [*(f"#{number}" for number in range(1, len(args) + 1)), *kwargs]
        raise TypeError(
            f"inputs ({', '.join(given)}) do not fit a program that was captured with "
            f"({', '.join(signature.parameters)}): {error}; change the inputs, or capture with "
            "example_inputs like them"
        ) from error
    return pytree.tree_leaves(list(bound.arguments.values()))
