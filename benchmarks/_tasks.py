"""What a pruned model is judged by: real models, on text and images that nothing was chosen on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _sources import Sources
from torch import Tensor, nn

from fxslim.criteria import LossFn

__all__ = ["Batch", "Metric", "Setup", "Task"]

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Setup:
    """What tasks are made from.

    Attributes:
        sources: Where models and data are.
        items: Test items of each labelled set, as far as it has them.
        windows: Test windows of the language model.
        calibration: Items for the criteria, of each source of text or images.
        device: Where models run.
        precision: The type that matrix products are made in while a model is judged.
    """

    sources: Sources
    items: int = 2000
    windows: int = 50
    calibration: int = 96
    device: str = "cpu"
    precision: torch.dtype = torch.float32

    def judging(self) -> torch.autocast:
        """The context in which models are judged, dense ones too."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, self.precision, enabled=self.precision != torch.float32)


@dataclass(frozen=True)
class Metric:
    """A mean over test items, with its interval.

    Attributes:
        name: What it is, and of what.
        logarithmic: The values are logarithms; what is shown is the exponential of their mean.
    """

    name: str
    logarithmic: bool = False

    def summary(self, values: Tensor, dense: Tensor) -> dict[str, Any]:
        """The mean with its 95 % interval, and its change from the dense model's, item by item.

        Args:
            values: (items,), the pruned model's.
            dense: (items,), the dense model's of the same items.
        """
        shown = math.exp if self.logarithmic else float
        mean, half = _interval(values)
        change, change_half = _interval(values - dense)
        return {
            "n": len(values),
            "value": shown(mean),
            "low": shown(mean - half),
            "high": shown(mean + half),
            "change": change,
            "change_half": change_half,
            "logarithmic": self.logarithmic,
        }


def _interval(values: Tensor) -> tuple[float, float]:
    """Mean, and half of its 95 % interval in the normal approximation."""
    values = values.double()
    return values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values))


@dataclass(frozen=True)
class Task:
    """A model, what its heads are scored on, and what it is judged by.

    Attributes:
        name: As in ``--task``.
        model: The dense model, in eval mode.
        example: Inputs to capture with: two items or more.
        calibration: Inputs for criteria and repair; none is a test item.
        loss_fn: The loss of an output, for criteria that need one.
        metrics: What is measured; the first one is drawn.
        measure: A module to the values (items,) of every metric by name, on the CPU.
    """

    name: str
    model: nn.Module
    example: Batch
    calibration: list[Batch]
    loss_fn: LossFn
    metrics: tuple[Metric, ...]
    measure: Callable[[nn.Module], dict[str, Tensor]]
