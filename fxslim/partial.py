"""Partial capture: where a model as a whole does not export, its largest submodules that do."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import deque
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxslim.capture import (
    capture_by_values,
    capture_call,
    check_model,
    is_program,
    without_cache,
)
from fxslim.errors import CaptureError
from fxslim.examples import Inputs, as_inputs, example_inputs_for
from fxslim.locate import locate
from fxslim.parts import meta_of, with_parts
from fxslim.undisturbed import buffers_kept, in_eval_mode, seeded

__all__ = ["Call", "capture_parts", "captured", "captured_call"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a call."""


def captured(
    model: nn.Module, example_inputs: Inputs | None = None, *, dynamic: bool = True
) -> nn.Module:
    """`model` as a program; where it does not export as a whole, with programs in it.

    Raises:
        TypeError, ValueError: as `fxslim.capture`.
        CaptureError: neither the model nor any submodule with a prunable attention exports.
    """
    if "parts" in meta_of(model) or is_program(model):
        return model
    check_model(model)
    given = example_inputs if example_inputs is not None else example_inputs_for(model)
    return captured_call(model, as_inputs(given), dynamic=dynamic)


def captured_call(model: nn.Module, call: Call, *, dynamic: bool = True) -> nn.Module:
    """What a call of `model` does, as a program or with programs in it; see `captured`.

    A model in parts takes all that it took before; a program that was captured by the values of the
    example may not, and is the last resort.
    """
    try:
        return capture_call(model, *call, dynamic=dynamic)
    except CaptureError as error:
        reason = error
    try:
        return capture_parts(model, call, reason, dynamic=dynamic)
    except CaptureError:
        program = capture_by_values(model, *call, reason, dynamic=dynamic)
    if not any(site.prunable for site in locate(program).sites):
        raise reason
    return program


def capture_parts(
    model: nn.Module, call: Call, reason: CaptureError, *, dynamic: bool
) -> nn.Module:
    """A copy of `model` with programs in place of the largest submodules that export.

    A submodule is replaced if it has a prunable attention, is called through its `forward`, and the
    model computes the same with the program on the example.  ``meta["parts"]`` of the result lists
    the paths, ``meta["capture"]`` why the whole did not export; both are a warning, too.

    Args:
        model: called without a cache where it takes `use_cache`.
        call: the arguments of an example call.
        reason: why the model as a whole could not be captured.
        dynamic: keep batch and sequence lengths symbolic, as far as the submodules allow.

    Raises:
        CaptureError: `reason`, if the model does not run, or none of its submodules will do.
    """
    with torch.no_grad():
        try:
            calls, expected = _recorded(model, call)
        except Exception as error:
            raise reason from error
        parts: dict[str, nn.Module] = {}
        waiting = deque(name for name, _ in model.named_children())
        while waiting:
            path = waiting.popleft()
            part = _program_of(model.get_submodule(path), path, calls.get(path), dynamic=dynamic)
            if part is not None:
                found = {**parts, path: part}
                if _does_the_same(with_parts(model, found), part, call, expected):
                    parts = found
                    continue
            waiting += (f"{path}.{name}" for name, _ in model.get_submodule(path).named_children())
    if not parts:
        raise reason
    name = type(model).__name__
    note = f"{name} does not export as a whole; captured in parts: {', '.join(parts)}\n{reason}"
    host = with_parts(model, parts)
    host.meta = {"parts": tuple(parts), "capture": (note,), "example_inputs": call}  # type: ignore[assignment]
    warnings.warn(f"fxslim: {note}", stacklevel=5)
    return host


def _run(model: nn.Module, call: Call) -> Any:
    """What the model makes of copies of the inputs in eval mode, without a cache, of one seed."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, call)
    with in_eval_mode(model), buffers_kept(model), seeded():
        return without_cache(model, kwargs)(*args, **kwargs)


def _recorded(model: nn.Module, call: Call) -> tuple[dict[str, Call], Any]:
    """The arguments of the first call of each submodule, and the model's output."""
    calls: dict[str, Call] = {}

    def record(path: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        if path not in calls:
            calls[path] = copy.copy(args), copy.copy(kwargs)

    hooks = [
        module.register_forward_pre_hook(functools.partial(record, path), with_kwargs=True)
        for path, module in model.named_modules()
        if path
    ]
    try:
        return calls, _run(model, call)
    finally:
        for hook in hooks:
            hook.remove()


def _program_of(
    module: nn.Module, path: str, call: Call | None, *, dynamic: bool
) -> fx.GraphModule | None:
    """The submodule as a program, if it is called, exports, and has attention to prune."""
    tensors = [t for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor)]
    if call is None or not tensors or not any(True for _ in module.parameters()):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = capture_call(module, *call, dynamic=dynamic)
    except CaptureError:
        return None
    program.meta["path"] = path
    return program if any(site.prunable for site in locate(program).sites) else None


def _does_the_same(model: nn.Module, part: nn.Module, call: Call, expected: Any) -> bool:
    """Whether the model calls the program, and computes what it did before."""
    called: list[bool] = []
    hook = part.register_forward_hook(lambda *_: called.append(True))
    try:
        output = _run(model, call)
    except Exception:  # noqa: BLE001  the model reads what a program does not have
        return False
    finally:
        hook.remove()
    return bool(called) and _close(output, expected)


def _close(output: Any, expected: Any) -> bool:
    got, wanted = (
        [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]
        for tree in (output, expected)
    )
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return False
    pairs = zip(got, wanted, strict=True)
    return all(torch.allclose(a, b, 1e-3, 1e-4, equal_nan=True) for a, b in pairs)
