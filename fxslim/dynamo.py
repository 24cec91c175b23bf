"""Dynamo's graphs: from what `torch.compile` hands a backend to a program that can be analysed.

Dynamo writes torch functions and methods, and lifts parameters to inputs.  The graph is traced once
more, before autograd, to functional ATen calls; parameters and buffers become `get_attr` again,
under the names that they have below the module whose frame was compiled.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._guards import TracingContext, compile_context, tracing

from fxslim.functional import decompositions
from fxslim.graph import attribute, fake_mode_of
from fxslim.partial import Call, captured_call
from fxslim.program import Program
from fxslim.tidying import tidy

__all__ = ["RunningCall", "Traced", "running_call", "trace"]

_WEIGHT = re.compile(r"_(parameters|buffers)('])?\[[^]]*\]$")
_CONTAINERS = {"__dict__", "_buffers", "_modules", "_parameters"}
"""Where modules hold what is read of them: steps of a source that are no part of a name."""


@dataclass(frozen=True)
class RunningCall:
    """The call of a module that `torch.compile` is compiling a piece of."""

    model: nn.Module
    call: Call

    def captured(self) -> nn.Module:
        """The model as a program, or with programs in it.

        Raises:
            CaptureError: neither the model nor any submodule with a prunable attention exports.
        """
        with tracing(None), compile_context(None):  # what export notes there would be guarded
            return captured_call(self.model, self.call)


def running_call() -> RunningCall | None:
    """What was given to `torch.compile`, as it is called now; None where that is a function.

    A backend is told of a graph only.  The call that led to it is on the stack: the innermost of
    ``torch.compile(model)``, or of a model after ``model.compile()`` or with a compiled `forward`.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is nn.Module._wrapped_call_impl.__code__:
            given = frame.f_locals
            module, call = given["self"], (given["args"], given["kwargs"])
            if isinstance(module, OptimizedModule):
                return RunningCall(module._orig_mod, call)
            if module._compiled_call_impl is not None or _is_compiled(module.forward):
                return RunningCall(module, call)
        frame = frame.f_back
    return None


def _is_compiled(forward: Callable[..., Any]) -> bool:
    """Whether it is what `torch.compile` made of a function."""
    return hasattr(forward, "_torchdynamo_orig_callable")


@dataclass(frozen=True)
class Traced:
    """A graph of Dynamo's as a program.

    Attributes:
        program: takes the inputs that Dynamo's graph takes, in the same order; those that are
            weights it reads as attributes instead.
        weights: the names of the parameters and buffers, each with the number of its input.
    """

    program: Program
    weights: Mapping[str, int]

    @property
    def is_dynamic(self) -> bool:
        """Whether some input has a symbolic size, or is one."""
        places = (n.meta.get("val") for n in self.program.graph.nodes if n.op == "placeholder")
        return any(
            isinstance(n, torch.SymInt)
            for value in places
            for n in (value.shape if isinstance(value, torch.Tensor) else [value])
        )

    def tensors(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """The weights among the inputs of a call, by name."""
        return {name: inputs[position] for name, position in self.weights.items()}


def trace(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Traced:
    """Trace a graph of Dynamo's to functional ATen calls, and read weights as attributes.

    What the graph writes to stays an input.  Grad mode, `detach` and random operators are kept, so
    that gradients are those of the original.

    Args:
        graph_module: what Dynamo hands a backend; not changed.
        example_inputs: its inputs, real or fake.
    """
    traced, signature = _functional(graph_module, example_inputs)
    places = {node.name: node for node in traced.graph.nodes if node.op == "placeholder"}
    written = _write_back(traced.graph, signature, places)
    constants = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for place, name in constants.items():
        tensor = attribute(graph_module, name)
        _read_as_attribute(traced, places.pop(place), name, tensor)
        traced.graph.erase_node(traced.graph.find_nodes(op="placeholder", target=place)[0])
    weights = {}
    inputs = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for position, (place, name) in enumerate(
        zip(places.values(), _weight_names(inputs), strict=True)
    ):
        if name and place not in written:
            weights[name] = position
            _read_as_attribute(traced, place, name, example_inputs[position])
    _shorten_paths(traced.graph)
    program = Program(traced, traced.graph, "Program")
    tidy(program)
    program.graph.eliminate_dead_code()
    program.recompile()
    return Traced(program, weights)


def _functional(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any]
) -> tuple[fx.GraphModule, Any]:
    """The graph in functional ATen calls, and its signature; see `functional.functional`."""
    from torch._functorch.aot_autograd import aot_export_module  # loads Dynamo, which takes long

    table: dict[Any, Callable[..., Any]] = {}
    while True:
        context = copy.copy(TracingContext.try_get())  # what tracing notes there is its own
        if context is not None:
            context.fake_mode = fake_mode_of(example_inputs) or context.fake_mode
        with tracing(context):
            traced, signature = aot_export_module(
                graph_module,
                list(example_inputs),
                trace_joint=False,
                pre_dispatch=True,
                decompositions=table,
            )
        assert isinstance(traced, fx.GraphModule)
        more = decompositions(traced.graph, table)
        if not more:
            return traced, signature
        table |= more


def _write_back(
    graph: fx.Graph, signature: Any, places: Mapping[str, fx.Node]
) -> frozenset[fx.Node]:
    """Copy to each input that the graph writes to what is an output for now; those inputs."""
    by_name = {name: place for place, name in signature.inputs_to_buffers.items()}
    buffers = {output: by_name[name] for output, name in signature.buffers_to_mutate.items()}
    target = {**buffers, **signature.user_inputs_to_mutate}
    result = graph.output_node()
    values: list[Any] = list(result.args[0])  # type: ignore[arg-type]
    for value in values[: len(target)]:
        with graph.inserting_before(result):
            copied = graph.call_function(
                torch.ops.aten.copy_.default, (places[target[value.name]], value)
            )
        copied.meta["val"] = value.meta["val"]
    result.args = (tuple(values[len(target) :]),)
    return frozenset(places[name] for name in target.values())


def _read_as_attribute(
    module: fx.GraphModule, place: fx.Node, name: str, tensor: torch.Tensor
) -> None:
    """Read `tensor`, put at a dotted path of `module`, instead of the input `place`."""
    *path, own = name.split(".")
    owner: nn.Module = module
    for step in path:
        if step not in owner._modules:
            owner.add_module(step, nn.Module())
        owner = owner.get_submodule(step)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(own, tensor)
    else:
        owner.register_buffer(own, tensor)
    graph = place.graph
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(first):
        read = graph.create_node("get_attr", name)
    read.meta = dict(place.meta)
    place.replace_all_uses_with(read)


def _weight_names(places: Iterable[fx.Node]) -> list[str]:
    """For each input of Dynamo's graph its name as a parameter or buffer; empty if it is none."""
    sources = [_source_name(place) for place in places]
    weights = [source if _WEIGHT.search(source) else "" for source in sources]
    short = [_path(source) for source in weights]
    if len(set(filter(None, short))) == len(list(filter(None, weights))):
        return short
    return [_path(source, root=True) for source in weights]  # of several models


def _source_name(place: fx.Node) -> str:
    """Where Dynamo reads an input: ``L['self']._modules['o']._parameters['weight']``."""
    source = getattr(place, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)  # a method in earlier versions of PyTorch


def _path(source: str, *, root: bool = False) -> str:
    """A source as a dotted path below the local or global variable that it begins with."""
    steps = re.sub(r"\['?([^]']*)'?\]", r".\1", source).split(".")[1:]
    names = [re.sub(r"\W", "_", step) for step in steps if step not in _CONTAINERS]
    return ".".join(filter(None, names if root else names[1:]))


def _shorten_paths(graph: fx.Graph) -> None:
    """Module paths as the model has them, without the variable that Dynamo found it in."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (_path(path), kind) for key, (path, kind) in stack.items()
            }
