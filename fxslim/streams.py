"""Streams of calibration batches: once more, over all processes, with values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import distributed, nn
from torch.utils import _pytree as pytree

from fxslim.examples import Inputs

__all__ = [
    "LossFn",
    "again",
    "averages",
    "check_values",
    "first",
    "given",
    "output_tensors",
    "reduce_sum",
    "with_values",
]

LossFn = Callable[[Any], torch.Tensor]
"""The loss of a model's output."""


_NO_BATCHES = "calibration has no batches"


def given(calibration: Iterable[Inputs] | None) -> Iterable[Inputs]:
    """The batches.

    Raises:
        ValueError: there are none.
    """
    if calibration is None:
        raise ValueError("this criterion needs calibration batches: pass calibration=[...]")
    return calibration


def again(calibration: Iterable[Inputs] | None) -> Iterable[Inputs]:
    """Batches that can be gone through more than once: a list of those that come only once."""
    batches = given(calibration)
    return list(batches) if iter(batches) is batches else batches


def first(batches: Iterable[Inputs]) -> Inputs:
    """The first batch.

    Raises:
        ValueError: there is none.
    """
    for batch in batches:
        return batch
    raise ValueError(_NO_BATCHES)


def output_tensors(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of a model's output, whatever holds them."""
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, dict) else output)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def reduce_sum(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors summed over all processes of `torch.distributed`, where that is on."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(tensors)
    total = [tensor.clone() for tensor in tensors]
    for tensor in total:
        distributed.all_reduce(tensor)
    return total


def averages(totals: Mapping[str, torch.Tensor], count: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over batches, divided by how many there were on all processes.

    Raises:
        ValueError: there were none.
    """
    *sums, batches = reduce_sum(*totals.values(), count)
    if not batches:
        raise ValueError(_NO_BATCHES)
    return {name: value / batches for name, value in zip(totals, sums, strict=True)}


def with_values(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """`tensor` detached.

    Raises:
        ValueError: it is on `meta`, so that it has no values to score.
    """
    if tensor.is_meta:
        raise ValueError(
            f"heads cannot be scored: {name!r} is on the meta device and has no values; load the "
            "weights first, or pass a plan, or criterion='random'"
        )
    return tensor.detach()


def check_values(module: nn.Module) -> None:
    """Refuse a model on `meta`, as `with_values` does."""
    for name, parameter in module.named_parameters():
        with_values(parameter, name)
