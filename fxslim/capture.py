"""Capture: from a model to a functional `torch.fx` program, lengths symbolic where possible."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import fx, nn
from torch.compiler import set_stance
from torch.utils import _pytree as pytree

from fxslim.differences import largest_difference, outputs_of, result_of, tensors_in
from fxslim.errors import CaptureError
from fxslim.examples import Inputs, as_inputs, example_inputs_for
from fxslim.exporting import (
    BY_VALUES,
    SYMBOLIC_LENGTHS,
    branches_on_values,
    export,
    length_dims,
)
from fxslim.graph import fixed_size
from fxslim.tidying import tidied
from fxslim.undisturbed import in_eval_mode

__all__ = [
    "capture",
    "capture_by_values",
    "capture_call",
    "check_model",
    "is_program",
    "without_cache",
]


def capture(
    model: nn.Module, example_inputs: Inputs | None = None, *, dynamic: bool = True
) -> fx.GraphModule:
    """Capture `model` as a functional graph of ATen calls.

    The program computes what the model does in eval mode: a graph holds dropout or does not, and
    would not stop it when `eval` is called.

    Args:
        model: any `nn.Module`, a `GraphModule` included.  Not changed, and no weight is copied.
        example_inputs: a tuple (positional), a dict (keyword) or one tensor.  Derived from the
            model where that is possible.
        dynamic: keep batch and sequence lengths symbolic, as far as the model allows.

    Returns:
        A `GraphModule` called as the model is.  ``program.meta["capture"]`` lists what was decided
        on the way; anything less than asked for is also a warning.

    Warns where the program computes something else of the example than the model did.

    Raises:
        TypeError: `model` is no module, or the inputs are no tensors.
        ValueError: the model has no parameters, a weight is NaN, or inputs are missing.
        CaptureError: PyTorch cannot export the model; quotes its reason.
    """
    check_model(model)
    args, kwargs = as_inputs(
        example_inputs if example_inputs is not None else example_inputs_for(model)
    )
    try:
        return capture_call(model, args, kwargs, dynamic=dynamic)
    except CaptureError as error:
        return capture_by_values(model, args, kwargs, error, dynamic=dynamic)


def capture_by_values(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reason: CaptureError,
    *,
    dynamic: bool,
) -> fx.GraphModule:
    """Capture a model that branches on values in its inputs, on the example's side.

    Raises:
        CaptureError: `reason`, where it is another one, or this does not help.
    """
    if not branches_on_values(reason):
        raise reason
    try:
        return capture_call(model, args, kwargs, dynamic=dynamic, by_values=True)
    except CaptureError:
        raise reason from reason.__cause__


def capture_call(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    dynamic: bool,
    by_values: bool = False,
) -> fx.GraphModule:
    """Capture what ``model(*args, **kwargs)`` does; see `capture`."""
    notes: list[str] = []
    learns = model.training  # regions of the model without gradients are told from others then
    with _unchanged(model), in_eval_mode(model), torch.set_grad_enabled(learns):
        callee = without_cache(model, kwargs)
        if callee is not model:
            notes.append(
                "called with use_cache=False: cached keys and values would be graph outputs"
            )
        result = _call_once(callee, args, kwargs)
        notes += _registered(result)
        expected = tensors_in(result)
        callee = _with_names(callee, kwargs)
        exported = export(callee, args, kwargs, dynamic, notes, by_values=by_values)
    program = tidied(exported, model)
    if notes[-1] == SYMBOLIC_LENGTHS:
        notes[-1:] = list(_fixed_sizes(program)) or [SYMBOLIC_LENGTHS]
    program.meta["capture"] = tuple(notes)
    program.meta["example_inputs"] = (args, kwargs)
    for note in notes:
        if note == BY_VALUES or note.startswith("static"):
            warnings.warn(f"fxslim.capture: {note}", stacklevel=3)
    _compare(program, expected)
    return program


def is_program(model: nn.Module) -> bool:
    """Whether `model` is what `capture` returned, and its shapes are known still."""
    if not isinstance(model, fx.GraphModule) or "capture" not in model.meta:
        return False
    return all("val" in node.meta for node in model.graph.find_nodes(op="placeholder"))


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


def without_cache(model: nn.Module, kwargs: Mapping[str, Any]) -> nn.Module:
    """The model called without a key-value cache: a cache would make keys and values outputs.

    It is asked to by name, or where it hands on what it does not name and its config has a cache.
    """
    parameters = inspect.signature(model.forward).parameters
    hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    caches = getattr(getattr(model, "config", None), "use_cache", False) is True
    if "use_cache" in kwargs or not ("use_cache" in parameters or (hands_on and caches)):
        return model
    return _with_forward(model, functools.partial(model.forward, use_cache=False))


def _with_names(model: nn.Module, kwargs: Mapping[str, Any]) -> nn.Module:
    """The model with a name for every argument that its ``**kwargs`` takes.

    `torch.export` finds no sizes for those (https://github.com/pytorch/pytorch/issues/150022).
    """
    signature = inspect.signature(model.forward)
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    others = [name for name in kwargs if name not in {p.name for p in named}]
    if not others or len(named) == len(signature.parameters):
        return model

    def forward(*args: Any, **kwargs: Any) -> Any:
        return model.forward(*args, **kwargs)

    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in others]
    forward.__signature__ = signature.replace(parameters=[*named, *added])  # type: ignore[attr-defined]
    return _with_forward(model, forward)


def _with_forward(model: nn.Module, forward: Callable[..., Any]) -> nn.Module:
    """The model, called in another way; its weights and modules are the same ones."""
    other = copy.copy(model)
    other.forward = forward
    return other


def _call_once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a model as it is first, so that what it computes once and keeps is not made by tracing.

    A function with a cache would hand fake tensors to its next caller.  A model that is given what
    it may change (a key-value cache) is not called; it and one that fails have no result.
    """
    plain = (torch.Tensor, int, float, str, type(None))
    if not all(isinstance(x, plain) for x in pytree.tree_leaves((args, kwargs))):
        return None
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    with set_stance("force_eager"), suppress(Exception):
        return result_of(model, args, kwargs)
    return None  # export meets what failed again, and its reason is what users are told


def _registered(result: Any) -> Iterator[str]:
    """Register the dataclasses of a result: `torch.export` takes only containers that are known."""
    for leaf in pytree.tree_leaves(result):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            kind = type(leaf)
            name = f"{kind.__module__}.{kind.__qualname__}"
            torch.export.register_dataclass(kind, serialized_type_name=name)
            yield (
                f"registered {kind.__qualname__}, which the model returns "
                "(torch.export.register_dataclass); so must be where the program is loaded"
            )
            yield from _registered(leaf)


def _compare(program: fx.GraphModule, expected: Sequence[torch.Tensor]) -> None:
    """Warn where a program computes something else of the example than the model did.

    Raises:
        CaptureError: it does not run on the example that it was captured with.
    """
    if not expected or any(tensor.is_meta for tensor in expected):
        return
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, program.meta["example_inputs"])
    try:
        got = outputs_of(program, args, kwargs)
    except RuntimeError as error:
        raise CaptureError(f"the program does not run on its own example: {error}") from error
    if how := _difference(expected, got):
        warnings.warn(
            f"fxslim.capture: {how}: traced, the model's code does something else, such as "
            "building a mask that it leaves out otherwise; another implementation of its attention "
            "may not",
            stacklevel=4,
        )


def _difference(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> str:
    """How a program's outputs differ from the model's by more than rounding, if they do."""
    if len(expected) != len(got):
        return f"the program returns {len(got)} tensors, the model {len(expected)}"
    for one, other in zip(expected, got, strict=True):
        difference, allowed = largest_difference(one, other)
        if not difference <= allowed:
            return (
                f"the program's outputs differ from the model's by {difference:.3g} "
                f"(rounding allows {allowed:.3g})"
            )
    return ""


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


def _fixed_sizes(program: fx.GraphModule) -> Iterator[str]:
    """The inputs whose batch or length the model turned out to fix."""
    for place in (node for node in program.graph.nodes if node.op == "placeholder"):
        value = place.meta.get("val")
        asked = length_dims(value) if isinstance(value, torch.Tensor) else []
        sizes = [fixed_size(value.shape[dim]) for dim in asked]
        batch, lengths = sizes[:1], [n for n in sizes[1:] if n != 1]
        if (batch and batch[0] is not None) or (lengths and None not in lengths):
            shown = ", ".join("symbolic" if n is None else str(n) for n in sizes)
            yield f"static sizes: the model takes {place.name!r} of ({shown}) only"
