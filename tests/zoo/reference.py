"""The dense model as a reference for the slim one: removed heads switched off, inputs resized."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

__all__ = ["Call", "Difference", "call_of", "compare", "resized", "without_heads"]


class ProjectionLike(Protocol):
    """What is needed of `fxslim.Projection`."""

    weight: str
    dim: int
    index: Tensor


class SiteLike(Protocol):
    """What is needed of `fxslim.AttentionSite`."""

    name: str
    num_heads: int
    output: Sequence[ProjectionLike]


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
        heads = kept.get(site.name, range(site.num_heads))
        removed = [head for head in range(site.num_heads) if head not in heads]
        for projection in site.output if removed else ():
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

    >>> compare([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 4.0])])
    Difference(absolute=2.0, relative=0.5)
    """
    if len(actual) != len(expected):
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


def resized(program: fx.GraphModule, call: Call) -> dict[str, Call]:
    """The same call with another batch, and with other lengths, as far as the program is dynamic.

    Returns:
        Calls by what was changed: "batch" and "length"; without those that are static.
    """
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    if not _match(leaves, values):
        return {}
    symbols, batch = _symbols(values), _batch_symbols(values)
    calls = {}
    for label, step, changed in (
        ("batch", 1, [symbol for symbol in symbols if symbol in batch]),
        ("length", 3, [symbol for symbol in symbols if symbol not in batch]),
    ):
        sizes = {symbol: _other_size(symbols[symbol], step) for symbol in changed}
        if any(sizes[symbol] != symbols[symbol].node.hint for symbol in changed):
            new = [_resize(leaf, v, sizes) for leaf, v in zip(leaves, values, strict=True)]
            args, kwargs = pytree.tree_unflatten(new, spec)
            calls[label] = Call(args, kwargs)
    return calls


def _match(leaves: Sequence[object], values: Sequence[object]) -> bool:
    """Whether the placeholders are the leaves of the call, in this order."""
    return len(leaves) == len(values) and all(
        not isinstance(value, Tensor)
        or (isinstance(leaf, Tensor) and tuple(leaf.shape) == tuple(map(_hint, value.shape)))
        for leaf, value in zip(leaves, values, strict=True)
    )


def _hint(size: int | torch.SymInt) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _symbolic_sizes(values: Sequence[object]) -> Iterator[tuple[int, torch.SymInt]]:
    for value in values:
        for dim, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, torch.SymInt):
                yield dim, size


def _symbols(values: Sequence[object]) -> dict[Any, torch.SymInt]:
    """Every symbol that is a size by itself."""
    return {size.node.expr: size for _, size in _symbolic_sizes(values) if size.node.expr.is_symbol}


def _batch_symbols(values: Sequence[object]) -> set[Any]:
    """The symbols that are leading sizes, and as large as the first of these."""
    leading = [size.node for dim, size in _symbolic_sizes(values) if dim == 0]
    return {node.expr for node in leading if node.hint == leading[0].hint}


def _other_size(size: torch.SymInt, step: int) -> int:
    """Larger by `step`, or smaller by one where the program has an upper bound in the way."""
    hint: int = size.node.hint
    bounds = size.node.shape_env.var_to_range[size.node.expr]
    if hint + step <= bounds.upper:
        return hint + step
    return max(hint - 1, int(bounds.lower))


def _resize(leaf: Any, value: object, sizes: Mapping[Any, int]) -> Any:
    """Repeat or cut a tensor along its symbolic dimensions."""
    if not isinstance(leaf, Tensor) or not isinstance(value, Tensor):
        return leaf
    for dim, size in _symbolic_sizes([value]):
        old = leaf.shape[dim]
        new = int(size.node.expr.subs(sizes | _unchanged(size, sizes)))
        leaf = leaf.index_select(dim, torch.arange(new) % old)
    return leaf


def _unchanged(size: torch.SymInt, sizes: Mapping[Any, int]) -> dict[Any, int]:
    hints = size.node.shape_env.backed_var_to_val
    return {s: int(hints[s]) for s in size.node.expr.free_symbols if s not in sizes}
