"""Capture: from a model to a functional `torch.fx` program, lengths symbolic where possible."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from fxslim.errors import CaptureError
from fxslim.examples import Inputs, as_inputs, example_inputs_for
from fxslim.graph import attribute, fixed_size, holds
from fxslim.program import Program, copy_graph

__all__ = ["as_program", "capture", "check_model"]

Choice = Callable[[torch.Tensor], list[int]]


def capture(
    model: nn.Module, example_inputs: Inputs | None = None, *, dynamic: bool = True
) -> fx.GraphModule:
    """Capture `model` as a functional graph of ATen calls.

    Args:
        model: any `nn.Module`, a `GraphModule` included.  Not changed, and no weight is copied.
        example_inputs: a tuple (positional), a dict (keyword) or one tensor.  Derived from the
            model where that is possible.
        dynamic: keep batch and sequence lengths symbolic, as far as the model allows.

    Returns:
        A `GraphModule` called as the model is.  ``program.meta["capture"]`` lists what was decided
        on the way; anything less than asked for is also a warning.

    Raises:
        TypeError: `model` is no module, or the inputs are no tensors.
        ValueError: the model has no parameters, a weight is NaN, or inputs are missing.
        CaptureError: PyTorch cannot export the model; quotes its reason.
    """
    check_model(model)
    args, kwargs = as_inputs(
        example_inputs if example_inputs is not None else example_inputs_for(model)
    )
    notes: list[str] = []
    callee = _without_cache(model, kwargs, notes)
    with _unchanged(model):
        exported = _export(callee, args, kwargs, dynamic, notes)
    program = _as_program(exported, model)
    if notes[-1] == _SYMBOLIC:
        notes[-1:] = list(_fixed_sizes(program)) or [_SYMBOLIC]
    program.meta["capture"] = tuple(notes)
    program.meta["example_inputs"] = (args, kwargs)
    for note in notes:
        if note.startswith("static"):
            warnings.warn(f"fxslim.capture: {note}", stacklevel=2)
    return program


def as_program(
    model: nn.Module, example_inputs: Inputs | None = None, *, dynamic: bool = True
) -> fx.GraphModule:
    """`model` itself if `capture` made it and its shapes are known, else captured."""
    if isinstance(model, fx.GraphModule) and "capture" in model.meta:
        places = (node for node in model.graph.nodes if node.op == "placeholder")
        if all("val" in node.meta for node in places):
            return model
    return capture(model, example_inputs, dynamic=dynamic)


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be a model to prune, before any work.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: it has no parameters, or one of them contains NaN.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    named = list(model.named_parameters())
    if not named:
        raise ValueError(f"{type(model).__name__} has no parameters, so there is nothing to prune")
    for name, parameter in named:
        if parameter.is_floating_point() and not parameter.is_meta and parameter.isnan().any():
            raise ValueError(
                f"parameter {name!r} contains NaN; load or initialise the weights first"
            )


def _without_cache(model: nn.Module, kwargs: Mapping[str, Any], notes: list[str]) -> nn.Module:
    """The model called without a key-value cache: a cache would make keys and values outputs."""
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" not in parameters or "use_cache" in kwargs:
        return model
    notes.append("called with use_cache=False: cached keys and values would be graph outputs")
    without = copy.copy(model)
    without.forward = functools.partial(model.forward, use_cache=False)
    return without


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what tracing leaves behind on the model: caches that now hold fake tensors."""
    before = [(module, _snapshot(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, saved in before:
            vars(module).clear()
            vars(module).update(saved)


def _snapshot(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes, with containers copied one level deep."""
    containers = (dict, list, set, OrderedDict)
    return {k: copy.copy(v) if type(v) in containers else v for k, v in attributes.items()}


# --------------------------------------------------------------------------------------- exporting


_SYMBOLIC = "batch and sequence lengths are symbolic"


def _attempts(dynamic: bool) -> Iterator[tuple[str, Choice]]:
    """Which dimensions to keep symbolic, from most to least."""
    if dynamic:
        yield _SYMBOLIC, _lengths
        yield "static sequence length: only the batch size is symbolic", _batch
        yield "static shapes: the program runs at the example's sizes only", lambda _: []
    else:
        yield "shapes fixed to the example's, as asked", lambda _: []


def _lengths(tensor: torch.Tensor) -> list[int]:
    """All dimensions of token ids, masks, waveforms and features; of pictures the batch."""
    if tensor.is_floating_point() and tensor.ndim > 3:
        return [0]
    return list(range(tensor.ndim))


def _batch(tensor: torch.Tensor) -> list[int]:
    return [0] if tensor.ndim else []


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool, notes: list[str]
) -> ExportedProgram:
    """Export with as many symbolic dimensions as the model allows."""
    failures: list[Exception] = []
    given = pytree.tree_map_only(torch.Tensor, _without_base, (args, kwargs))
    for note, choice in _attempts(dynamic):
        for inputs in _example_variants(given, choice):
            try:
                exported = _export_once(model, *inputs, choice, notes)
            except Exception as error:  # noqa: BLE001  whatever PyTorch raises is its reason
                failures.append(error)
            else:
                notes.append(note)
                return exported
    raise CaptureError(_explain(model, failures)) from failures[0]


def _without_base(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is no view: export would compare a view's sizes with those of its base."""
    return tensor.clone() if tensor._is_view() else tensor


def _example_variants(
    inputs: tuple[tuple[Any, ...], dict[str, Any]], choice: Choice
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The inputs; a batch of one is doubled first, because PyTorch fixes sizes of one."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.ndim]
    if tensors and all(t.shape[0] == 1 for t in tensors) and any(choice(t) for t in tensors):

        def double(leaf: Any) -> Any:
            whole = isinstance(leaf, torch.Tensor) and leaf.ndim
            return torch.cat([leaf, leaf]) if whole else leaf

        yield pytree.tree_map(double, inputs)
    yield inputs


def _export_once(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    choice: Choice,
    notes: list[str],
) -> ExportedProgram:
    with torch.no_grad() if not model.training else torch.enable_grad():
        exported = _traced(model, args, kwargs, choice, {})
        ties = _ties(exported, len(pytree.tree_leaves((args, kwargs))))
        if ties:
            try:
                exported = _traced(model, args, kwargs, choice, ties)
            except Exception as error:  # noqa: BLE001  the first capture is right, only less exact
                said = (str(error).strip().splitlines() or [type(error).__name__])[0]
                notes.insert(0, f"input sizes that must agree could not be tied: {said}")
        functional: ExportedProgram = exported.run_decompositions({})
        return functional


_Ties = Mapping[tuple[int, int], Any]
"""Named sizes of inputs: (number of the input, dimension) to a `torch.export.Dim`."""


def _traced(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], choice: Choice, ties: _Ties
) -> ExportedProgram:
    """Export with the dimensions of `choice` symbolic."""
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for i, leaf in enumerate(pytree.tree_leaves((args, kwargs))):
        if isinstance(leaf, torch.Tensor) and choice(leaf):
            chosen = (d for d in choice(leaf) if leaf.shape[d] != 1)
            shapes[leaf] = {d: ties.get((i, d), Dim.AUTO) for d in chosen}
    dynamic_shapes = shapes.dynamic_shapes(model, args, kwargs)  # type: ignore[no-untyped-call]
    exported: ExportedProgram = torch.export.export(
        model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
    )
    return exported


def _ties(exported: ExportedProgram, count: int) -> _Ties:
    """One name for input sizes that must be equal though the model never says so.

    Where two inputs have a batch dimension each, tracing may rely on four times the one divided by
    the other being four: an equation that holds for some sizes only, unless the two are one.
    """
    places = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"]
    mode = detect_fake_mode(places)
    environment = mode.shape_env if mode is not None else None
    if environment is None:
        return {}
    relations = [environment.replace(guard.expr) for guard in environment.guards]
    loose = {s for relation in relations if not holds(relation) for s in relation.free_symbols}
    names: dict[int, Any] = {}
    ties = {}
    for i, value in enumerate(places[len(places) - count :]):
        sizes: Sequence[Any] = value.shape if isinstance(value, torch.Tensor) else ()
        for d, n in enumerate(sizes):
            if isinstance(n, torch.SymInt) and n.node.expr in loose:
                ties[i, d] = names.setdefault(n.node.hint, Dim(f"size_{n.node.hint}"))
    return ties


def _explain(model: nn.Module, failures: list[Exception]) -> str:
    first = str(failures[0]).strip().splitlines()
    said = "\n".join(f"    {line}" for line in first[:12])
    return (
        f"torch.export could not capture {type(model).__name__}.\n"
        f"PyTorch said ({type(failures[0]).__name__}):\n{said}\n"
        "Try: other example_inputs (batch of 2 or more, every tensor the forward needs), a "
        "submodule that exports by itself, or attn_implementation='eager' or 'sdpa' where the "
        "model has both."
    )


# ------------------------------------------------------------------------------------- tidying up


def _as_program(exported: ExportedProgram, model: nn.Module) -> fx.GraphModule:
    """A plain `GraphModule` under the model's own names, its graph free of export's scaffolding."""
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    _name_canonically(module, model)
    program = Program(module, copy_graph(module.graph)[0], type(model).__name__)
    _inline_wrappers(program)
    _drop_assertions(program)
    _free_views(program)
    _check_inputs(program, exported)
    program.graph.eliminate_dead_code()
    program.delete_all_unused_submodules()
    program.graph.lint()
    program.recompile()
    program.train(model.training)
    return program


def _name_canonically(module: fx.GraphModule, model: nn.Module) -> None:
    """Read a tied parameter under the name that comes first in the model."""
    first = {id(tensor): name for name, tensor in model.named_parameters()}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            node.target = first.get(id(attribute(module, node.target)), node.target)


def _inline_wrappers(program: fx.GraphModule) -> None:
    """Put the bodies of grad-mode and autocast regions in place of the calls that wrap them."""
    for node in list(program.graph.nodes):
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        body = next((a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"), None)
        inner = getattr(program, str(body.target), None) if body is not None else None
        if not node.target._name.startswith("wrap_with_") or not isinstance(inner, fx.GraphModule):
            continue
        operands = node.args[node.args.index(body) + 1 :]
        places = [n for n in inner.graph.nodes if n.op == "placeholder"]
        values: dict[fx.Node, Any] = dict(zip(places, operands, strict=True))
        with program.graph.inserting_before(node):
            result = program.graph.graph_copy(inner.graph, values)
        _replace_results(program, node, result)
        program.graph.erase_node(node)


def _replace_results(program: fx.GraphModule, node: fx.Node, result: Any) -> None:
    for user in list(node.users):
        if user.op == "call_function" and getattr(user.target, "__name__", "") == "getitem":
            user.replace_all_uses_with(result[user.args[1]])
            program.graph.erase_node(user)
        else:
            user.replace_input_with(node, result)


def _drop_assertions(program: fx.GraphModule) -> None:
    """Remove what only observes: tensor metadata that tracing asserted."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)


def _free_views(program: fx.GraphModule) -> None:
    """A view's strides are those of the traced sizes; a reshape is right at every size."""
    views = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}
    for node in program.graph.nodes:
        if node.target in views:
            node.target = torch.ops.aten.reshape.default


def _fixed_sizes(program: fx.GraphModule) -> Iterator[str]:
    """The inputs whose batch or length the model turned out to fix."""
    for place in (node for node in program.graph.nodes if node.op == "placeholder"):
        value = place.meta.get("val")
        asked = _lengths(value) if isinstance(value, torch.Tensor) else []
        sizes = [fixed_size(value.shape[dim]) for dim in asked]
        batch, lengths = sizes[:1], [n for n in sizes[1:] if n != 1]
        if (batch and batch[0] is not None) or (lengths and None not in lengths):
            shown = ", ".join("symbolic" if n is None else str(n) for n in sizes)
            yield f"static sizes: the model takes {place.name!r} of ({shown}) only"


def _check_inputs(program: fx.GraphModule, exported: ExportedProgram) -> None:
    """Assert the sizes that the program was specialised to, so that others never pass silently."""
    bounds = {str(symbol): limits for symbol, limits in exported.range_constraints.items()}
    places = [n for n in program.graph.nodes if n.op == "placeholder"]
    for place in reversed(places):
        value = place.meta.get("val")
        for dim, n in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            _check_size(program.graph, places[-1], place, dim, n, bounds)


def _check_size(
    graph: fx.Graph,
    after: fx.Node,
    place: fx.Node,
    dim: int,
    n: int | torch.SymInt,
    bounds: Mapping[str, Any],
) -> None:
    compare: Callable[[Any, Any], Any] = operator.eq
    size, least = fixed_size(n), ""
    if size is None:
        limits = bounds.get(str(n))
        if limits is None or not limits.upper < 2**31:
            return
        size, compare, least = int(limits.upper), operator.le, "at most "
    message = (
        f"input {place.name!r} has another size in dimension {dim} than the program was captured "
        f"for ({least}{size}); capture it with such an example"
    )
    with graph.inserting_after(after):
        given = graph.call_function(torch.ops.aten.sym_size.int, (place, dim))
    given.meta["val"] = n
    with graph.inserting_after(given):
        fits = graph.call_function(compare, (given, size))
    with graph.inserting_after(fits):
        graph.call_function(torch._assert, (fits, message))
