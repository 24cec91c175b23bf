"""Shapes after narrowing: written from the axis map, then proven node by node."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxslim import graph
from fxslim.analysis import AxisMap
from fxslim.axes import Dim, size
from fxslim.calls import Dims
from fxslim.errors import VerificationError
from fxslim.positions import Keep, narrowed_size

__all__ = ["check_shapes", "narrow_shapes", "unknowable"]


def narrow_shapes(axes: AxisMap, keep: Keep, nodes: Iterable[fx.Node]) -> None:
    """Give each node the fake tensors that its axes say it has once they are narrow.

    A fake tensor has no values: nodes of one shape share one, since each takes long to make.
    """
    made: dict[Any, torch.Tensor] = {}

    def narrow(value: torch.Tensor, dims: Dims) -> torch.Tensor:
        sizes = [_narrow_size(n, dim, keep) for n, dim in zip(value.shape, dims, strict=True)]
        if all(new is old for new, old in zip(sizes, value.shape, strict=True)):
            return value
        key = (tuple(map(str, sizes)), value.dtype, value.device)
        if key not in made:
            with value.fake_mode:  # type: ignore[attr-defined]
                made[key] = torch.empty(sizes, dtype=value.dtype, device=value.device)
        return made[key]

    for node in nodes:
        value, dims = node.meta.get("val"), axes.dims[node]
        if isinstance(value, torch.Tensor):
            node.meta["val"] = narrow(value, dims[0])
        elif isinstance(value, (tuple, list)):
            results = iter(dims)
            node.meta["val"] = type(value)(
                narrow(v, next(results)) if isinstance(v, torch.Tensor) else v for v in value
            )


def _narrow_size(n: int | torch.SymInt, dim: Dim, keep: Keep) -> int | torch.SymInt:
    old, new = size(dim), narrowed_size(dim, keep)
    if old == new:
        return n
    if not isinstance(n, torch.SymInt):
        return new
    ratio = Fraction(new, old)
    narrow: torch.SymInt = n // ratio.denominator * ratio.numerator
    return narrow


def check_shapes(program: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
    """Infer the shape of each node from its operands anew, at the sizes of the example.

    Every node agreeing with its operands, the whole program does.

    Raises:
        VerificationError: PyTorch gives another shape than the node has been given, or refuses.
    """
    infer = _Inference()
    for node in nodes:
        if node.op == "get_attr" and graph.is_tensor(node):
            _agree(node, graph.attribute(program, str(node.target)), node.meta["val"])
        elif _is_operator(node):
            _agree(node, infer(node), node.meta["val"])


def unknowable(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes of a right program that disagree at the sizes made up for lengths out of data.

    Two such lengths may have to be equal, or the sum of others; nothing is learned from a check.
    """
    infer, found = _Inference(), set()
    for node in nodes:
        if _is_operator(node) and any(map(_is_made_up, (node, *graph.tensor_inputs(node)))):
            try:
                with _without_log():
                    _agree(node, infer(node), node.meta["val"])
            except VerificationError:
                found.add(node)
    return found


@contextmanager
def _without_log() -> Iterator[None]:
    """Fake tensors log whatever they refuse, with a trace."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _is_operator(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OperatorBase)


def _is_made_up(node: fx.Node) -> bool:
    value = node.meta.get("val")
    sizes: Iterable[int | torch.SymInt] = value.shape if isinstance(value, torch.Tensor) else ()
    return any(isinstance(n, torch.SymInt) and not n.node.has_hint() for n in sizes)


class _Inference:
    """What PyTorch makes of calls at the sizes of the example; calls that are alike once."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode()
        self._operands: dict[Any, torch.Tensor] = {}
        self._results: dict[tuple[Any, str], Any] = {}

    def __call__(self, node: fx.Node) -> Any:
        call = fx.map_arg((node.args, node.kwargs), lambda n: _signature(n.meta.get("val")))
        key = (node.target, str(call))
        if key not in self._results:
            operands = fx.map_arg((node.args, node.kwargs), self._operand)
            self._results[key] = self._infer(node, *operands)
        return self._results[key]

    def _operand(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return _signature(value)
        key = _signature(value)
        if key not in self._operands:
            with self._mode:
                self._operands[key] = torch.empty(key[0], dtype=value.dtype, device=value.device)
        return self._operands[key]

    def _infer(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        try:
            with self._mode, torch.no_grad():
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError, ValueError) as error:
            raise VerificationError(_disagreement(node, f"PyTorch refuses: {error}")) from error


def _signature(value: Any) -> Any:
    """What a result's shape can depend on."""
    if isinstance(value, torch.Tensor):
        return _example_shape(value), value.dtype, value.device
    return graph.example_size(value) if isinstance(value, torch.SymInt) else value


def _example_shape(value: torch.Tensor) -> tuple[int, ...]:
    return tuple(graph.example_size(n) for n in value.shape)


def _agree(node: fx.Node, inferred: Any, given: Any) -> None:
    """Compare the shapes of one result, or of each of several."""
    if isinstance(given, (tuple, list)):
        for one, other in zip(inferred, given, strict=True):
            _agree(node, one, other)
    elif isinstance(given, torch.Tensor) and _example_shape(given) != tuple(inferred.shape):
        raise VerificationError(
            _disagreement(
                node, f"it is {tuple(inferred.shape)} where its axes say {_example_shape(given)}"
            )
        )


def _disagreement(node: fx.Node, what: str) -> str:
    return (
        f"{graph.user_name(node)} does not fit after narrowing: {what}; please report it with "
        "print(fxslim.show(program))"
    )
