"""The dense model as a reference for the slim one: removed heads switched off."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["TOLERANCE", "Call", "Difference", "call_of", "compare", "dense_of", "without_heads"]

TOLERANCE = 1e-4
"""Of the relative difference; a head too many or too few is far above it, rounding far below."""


class ProjectionLike(Protocol):
    """What is needed of `fxslim.Projection`."""

    weight: str
    dim: int
    index: Tensor


class SiteLike(Protocol):
    """What is needed of a site: an attention, or a feed-forward block with its channels."""

    name: str
    size: int
    summed_by: Sequence[ProjectionLike]


@dataclass(frozen=True)
class Call:
    """The arguments of one forward call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, model: nn.Module) -> list[Tensor]:
        """Call the model without a cache, and return the tensors of its result in order."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        if "use_cache" in inspect.signature(model.forward).parameters:
            kwargs["use_cache"] = False
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # some architectures draw noise
            return list(_tensors(model(*args, **kwargs)))


def call_of(inputs: tuple[Any, ...] | dict[str, Any]) -> Call:
    """The call with these inputs: a tuple of positional or a dict of keyword arguments."""
    return Call(inputs, {}) if isinstance(inputs, tuple) else Call((), inputs)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def dense_of(program: nn.Module, model: nn.Module, call: Call) -> nn.Module:
    """The model to compare with: the program itself where capture warned that it differs.

    Traced, transformers' masks are built where its SDPA leaves them out.
    """
    return model if compare(call.on(program), call.on(model)).relative <= TOLERANCE else program


def without_heads(
    model: nn.Module, sites: Iterable[SiteLike], kept: Mapping[str, Sequence[int]]
) -> nn.Module:
    """A copy of the model in which the output projections do not read the removed heads.

    Zero columns of the output projection are the mask at the operand of the contraction that ends
    the head axis, whatever the attention before it looks like.
    """
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for site in sites:
        heads = kept.get(site.name, range(site.size))
        removed = [head for head in range(site.size) if head not in heads]
        for projection in site.summed_by if removed else ():
            positions = projection.index[removed].flatten()
            parameters[projection.weight].data.index_fill_(projection.dim, positions, 0)
    return model


@dataclass(frozen=True)
class Difference:
    """How far two results are apart.

    Attributes:
        absolute: The largest difference of two elements.
        relative: The largest difference within a tensor over that tensor's largest element.
    """

    absolute: float
    relative: float

    def __or__(self, other: Difference) -> Difference:
        return Difference(max(self.absolute, other.absolute), max(self.relative, other.relative))


NO_DIFFERENCE = Difference(0.0, 0.0)
INCOMPARABLE = Difference(float("inf"), float("inf"))


def compare(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> Difference:
    """The difference of two results; infinite where they differ in number, shape, NaN or infinity.

    Nothing to compare is infinitely different, too.

    >>> compare([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 4.0])])
    Difference(absolute=2.0, relative=0.5)
    """
    if not expected or len(actual) != len(expected):
        return INCOMPARABLE
    total = NO_DIFFERENCE
    for ours, theirs in zip(actual, expected, strict=True):
        total |= _tensor_difference(ours, theirs)
    return total


def _tensor_difference(actual: Tensor, expected: Tensor) -> Difference:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return INCOMPARABLE
    if actual.is_complex():
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(actual.nan_to_num(0.5)[~finite], expected.nan_to_num(0.5)[~finite]):
        return INCOMPARABLE
    if not finite.any():
        return NO_DIFFERENCE
    absolute = (actual - expected)[finite].abs().max().item()
    if absolute != absolute:
        return INCOMPARABLE
    return Difference(absolute, absolute / max(expected[finite].abs().max().item(), 1e-6))
