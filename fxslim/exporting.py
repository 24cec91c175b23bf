"""Exporting: `torch.export` with as many symbolic lengths as the model allows."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any
from unittest import mock

import sympy  # type: ignore[import-untyped]
import torch
from torch import nn
from torch._subclasses import meta_utils
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    ShapeEnv,
    canonicalize_bool_expr,
)
from torch.utils import _pytree as pytree

from fxslim.assertions import assertions_in, relied_on
from fxslim.errors import CaptureError
from fxslim.functional import functional
from fxslim.graph import fixed_size, guards_of, holds

__all__ = [
    "BY_VALUES",
    "SYMBOLIC_LENGTHS",
    "branches_on_values",
    "export",
    "length_dims",
]

_TELLS = "_log_real_tensor_propagation"
"""The method of PyTorch that is told which side of a branch is taken by the example's values."""

Choice = Callable[[torch.Tensor], list[int]]
"""The dimensions of an input that are to be symbolic."""

SYMBOLIC_LENGTHS = "batch and sequence lengths are symbolic"
BY_VALUES = "the model branches on values in its inputs: others than the example's may be refused"


def _attempts(dynamic: bool) -> Iterator[tuple[str, Choice]]:
    """Which dimensions to keep symbolic, from most to least."""
    if dynamic:
        yield SYMBOLIC_LENGTHS, length_dims
        yield "static sequence length: only the batch size is symbolic", _batch
        yield "static shapes: the program runs at the example's sizes only", lambda _: []
    else:
        yield "shapes fixed to the example's, as asked", lambda _: []


def length_dims(tensor: torch.Tensor) -> list[int]:
    """All dimensions of token ids, masks, waveforms and features; of pictures the batch."""
    if tensor.is_floating_point() and tensor.ndim > 3:
        return [0]
    return list(range(tensor.ndim))


def _batch(tensor: torch.Tensor) -> list[int]:
    return [0] if tensor.ndim else []


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic: bool,
    notes: list[str],
    *,
    by_values: bool = False,
) -> ExportedProgram:
    """Export with as many symbolic dimensions as the model allows.

    With `by_values` tracing takes the example's side of branches on values in the inputs (draft
    export calls it real tensor propagation); the program asserts that it is the right one.
    """
    if not by_values:
        return _export(model, args, kwargs, dynamic, notes)
    if not hasattr(ShapeEnv, _TELLS):
        raise CaptureError("this version of PyTorch does not tell which sides it takes")
    propagated = torch._functorch.config.patch(fake_tensor_propagate_real_tensors=True)
    with propagated, mock.patch.object(meta_utils, "_safe_copy", _copy_values, create=True):
        exported = _export(model, args, kwargs, dynamic, notes)
    notes.insert(0, BY_VALUES)
    return exported


def _copy_values(target: torch.Tensor, source: torch.Tensor | None) -> None:
    """Copy what is a plain tensor, or a parameter.

    PyTorch 2.13 leaves the real values of parameters unset, so that sides were taken by chance.
    """
    plain = None if source is None else source.detach()
    if type(plain) is torch.Tensor:
        target.copy_(plain)


def branches_on_values(error: CaptureError) -> bool:
    """Whether a model was not captured because it branches on values in its inputs."""
    return isinstance(error.__cause__, GuardOnDataDependentSymNode)


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool, notes: list[str]
) -> ExportedProgram:
    failures: list[Exception] = []
    given = pytree.tree_map_only(torch.Tensor, _copied, (args, kwargs))
    for note, choice in _attempts(dynamic):
        for inputs in _example_variants(given, choice):
            try:
                exported = _export_once(model, *inputs, choice, notes)
            except Exception as error:  # noqa: BLE001  whatever PyTorch raises is its reason
                failures.append(error)
            else:
                if inputs is not given and not _takes(exported, inputs, given):
                    continue
                notes.append(note)
                return exported
    raise CaptureError(_explain(model, failures)) from failures[0]


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """An input that is nothing else, too.

    Export takes two inputs that are one tensor for one input, an input that is a weight for the
    weight, and compares the sizes of a view with those of its base.
    """
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


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


def _takes(exported: ExportedProgram, inputs: Any, given: Any) -> bool:
    """Whether what was traced with `inputs` takes a batch of another size, that of `given`."""
    sizes: dict[sympy.Expr, int] = {}
    values = _input_values(exported, inputs)
    for value, leaf in zip(values, pytree.tree_leaves(given), strict=True):
        if isinstance(value, torch.Tensor) and value.ndim:
            shape: Sequence[Any] = value.shape
            if fixed_size(shape[0]) is not None:
                return False
            for symbolic, size in zip(shape, leaf.shape, strict=True):
                if fixed_size(symbolic) is None:
                    sizes[symbolic.node.expr] = size
    return all(relation.xreplace(sizes) != sympy.false for relation in relied_on(exported))


def _input_values(exported: ExportedProgram, inputs: Any) -> list[Any]:
    """The fake tensors, and whatever else, that the program was traced with."""
    places = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"]
    return places[len(places) - len(pytree.tree_leaves(inputs)) :]


def _export_once(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    choice: Choice,
    notes: list[str],
) -> ExportedProgram:
    exported = _traced(model, args, kwargs, choice, {})
    ties = _ties(_input_values(exported, (args, kwargs)))
    if ties:
        try:
            exported = _traced(model, args, kwargs, choice, ties)
        except Exception as error:  # noqa: BLE001  the first capture is right, only less exact
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            notes.insert(0, f"input sizes that must agree could not be tied: {said}")
    return functional(exported)


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
    with _without_partial_graph(), _decisions() as decided:
        exported: ExportedProgram = torch.export.export(
            model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
        )
    said = {relation for relation, _ in assertions_in(exported.graph)}
    for relation in map(str, map(canonicalize_bool_expr, decided)):
        if relation not in said:
            raise CaptureError(f"the program would not assert what it was traced for: {relation}")
    return exported


@contextmanager
def _decisions() -> Iterator[list[sympy.Basic]]:
    """What tracing takes for true because it is true of the example's values.

    PyTorch asserts it in the program, but not of all that it reads: 2.13 forgets a number that is
    compared and nothing more, 2.9 truth values.
    """
    decided: list[sympy.Basic] = []

    def keep(_: ShapeEnv, expression: sympy.Basic, found: sympy.Basic) -> None:
        if found in (sympy.true, sympy.false):
            decided.append(expression if found == sympy.true else sympy.Not(expression))
        else:
            decided.append(sympy.Eq(expression, found))

    with mock.patch.object(ShapeEnv, _TELLS, keep, create=True):
        yield decided


@contextmanager
def _without_partial_graph() -> Iterator[None]:
    """Keep off stderr the graph so far, which PyTorch prints at a branch on data: more is tried."""
    said, graph = io.StringIO(), ""
    try:
        with redirect_stderr(said):
            yield
    except Exception as error:
        graph = getattr(error, "partial_fx_graph", "")
        raise
    finally:
        sys.stderr.write(said.getvalue().replace(f"{graph}\n", "") if graph else said.getvalue())


def _ties(values: Sequence[Any]) -> _Ties:
    """One name for input sizes that must be equal though the model never says so.

    Where two inputs have a batch dimension each, tracing may rely on four times the one divided by
    the other being four: an equation that holds for some sizes only, unless the two are one.
    """
    relations = (relation for _, relation in guards_of(values))
    loose = {s for relation in relations if not holds(relation) for s in relation.free_symbols}
    places: dict[int, list[tuple[int, int]]] = {}
    for i, value in enumerate(values):
        sizes: Sequence[Any] = value.shape if isinstance(value, torch.Tensor) else ()
        for d, n in enumerate(sizes):
            if isinstance(n, torch.SymInt) and n.node.expr in loose:
                places.setdefault(n.node.hint, []).append((i, d))
    names = {hint: Dim(f"size_{hint}") for hint, equal in places.items() if len(equal) > 1}
    return {place: name for hint, name in names.items() for place in places[hint]}


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
