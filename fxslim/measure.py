"""What a model costs: parameters, operations and time, two models measured side by side."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fxslim.examples import Inputs, as_inputs

__all__ = ["Totals", "bind", "count_flops", "count_parameters", "interleave", "totals"]


@dataclass(frozen=True)
class Totals:
    """A model before and after, in pairs (dense, slim).

    Attributes:
        parameters: Elements of all parameters; a tied one counts once.
        flops: Floating-point operations of one forward pass.
        seconds: Median time of one forward pass, both measured in turn.
    """

    parameters: tuple[int, int]
    flops: tuple[int, int]
    seconds: tuple[float, float]


def totals(dense: nn.Module, slim: nn.Module, inputs: Inputs, budget: float = 10.0) -> Totals:
    """Count two modules and time them on the same inputs, for about `budget` seconds."""
    calls = {"dense": bind(dense, inputs), "slim": bind(slim, inputs)}
    seconds = interleave(calls, budget=budget)
    return Totals(
        parameters=(count_parameters(dense), count_parameters(slim)),
        flops=(count_flops(calls["dense"]), count_flops(calls["slim"])),
        seconds=(statistics.median(seconds["dense"]), statistics.median(seconds["slim"])),
    )


def bind(module: Callable[..., Any], inputs: Inputs) -> Callable[[], Any]:
    """The module's call on these inputs, as a function of nothing."""
    args, kwargs = as_inputs(inputs)
    return functools.partial(module, *args, **kwargs)


def count_parameters(module: nn.Module) -> int:
    """Elements of all parameters; a tied one counts once.

    >>> count_parameters(nn.Linear(3, 4))
    16
    """
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of one call: two for each multiply-add of its matrix products.

    Attention runs as plain matrix products meanwhile: PyTorch's counter does not know every
    fused kernel, and counts those that it does not know as nothing.

    >>> count_flops(bind(nn.Linear(3, 4), (torch.zeros(2, 3),)))
    48
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def interleave(
    calls: Mapping[str, Callable[[], object]],
    repeats: int = 20,
    warmup: int = 2,
    budget: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds that each call takes, in each of so many rounds.

    A round makes every call once, every other round in reverse order, so that a machine which
    grows slower or faster meanwhile does so for all of them alike.

    Args:
        calls: What to time, by name.
        repeats: Rounds that count.
        warmup: Rounds before those.
        budget: Seconds after which no more rounds begin, once five have counted.

    Returns:
        For each name, the seconds of every round, in order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget
    with torch.no_grad():
        for turn in range(-warmup, repeats):
            if turn >= 5 and time.perf_counter() > end:
                break
            for name in list(calls)[:: -1 if turn % 2 else 1]:
                taken = _time(calls[name])
                if turn >= 0:
                    seconds[name].append(taken)
    return seconds


def _time(call: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
