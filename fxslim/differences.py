"""Differences of outputs, and which of them are rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxslim.undisturbed import buffers_kept, seeded

__all__ = ["largest_difference", "outputs_of", "result_of", "tensors_in"]

_ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The largest difference that counts as rounding, relative to the largest value of the output."""


def outputs_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    """The tensors that a call returns, whatever holds them; with the same noise each time."""
    return tensors_in(result_of(module, args, kwargs))


def result_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call returns, with the same noise each time."""
    with torch.no_grad(), seeded(), buffers_kept(module):
        return module(*args, **kwargs)


def tensors_in(result: Any) -> list[torch.Tensor]:
    """The tensors of a result, in order."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def largest_difference(expected: torch.Tensor, got: torch.Tensor) -> tuple[float, float]:
    """The largest difference of two tensors, and the largest that is rounding."""
    if expected.shape != got.shape:
        return float("inf"), 0.0
    if not expected.numel():
        return 0.0, 0.0
    share = _ROUNDING.get(expected.dtype, 0.0)
    a, b = (_comparable(t) for t in (expected, got))
    both = a.isfinite() & b.isfinite()
    if not torch.equal(a.nan_to_num()[~both], b.nan_to_num()[~both]):
        return float("inf"), 0.0
    difference = (a - b)[both].abs()
    scale = a[both].abs().max().item() if both.any() else 0.0
    return (difference.max().item() if both.any() else 0.0), share * max(scale, 1e-3)


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor).double() if tensor.is_complex() else tensor.double()
