"""Schedules: how many heads are gone at which optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["DECAYS", "Schedule"]

DECAYS: Mapping[str, Callable[[float, float], float]] = {
    "cos": lambda target, progress: target * (1 - math.cos(progress * math.pi / 2)),
    "cube": lambda target, progress: target * progress**3,
    "exp": lambda target, progress: 1 - (1 - target) ** progress,
    "linear": lambda target, progress: target * progress,
}
"""The sparsity at a progress in [0, 1] towards a target, by name (Intel Neural Compressor's)."""


@dataclass(frozen=True)
class Schedule:
    """The sparsity that grows from 0 at `start` to `target` at `end`, at regular steps.

    A step is numbered by the optimizer steps done before it.

    Attributes:
        target: the sparsity in the end, in [0, 1).
        start, end: the first step at which heads may go, and the last; one step if they are equal.
        frequency: steps from one pruning to the next.
        decay: a name in `DECAYS`.
    """

    target: float
    start: int = 0
    end: int = 0
    frequency: int = 1
    decay: str = "exp"

    @property
    def last(self) -> int:
        """The step of the last pruning, with which the target is reached."""
        return self.end - (self.end - self.start) % self.frequency

    def prunes_at(self, step: int) -> bool:
        """Whether heads may go at a step."""
        return self.start <= step <= self.end and (step - self.start) % self.frequency == 0

    def progress(self, step: int) -> float:
        """The share of the way from the first pruning to the last, in [0, 1]."""
        if step >= self.last:
            return 1.0
        return max(step - self.start, 0) / (self.last - self.start)

    def sparsity(self, step: int) -> float:
        """The sparsity from the pruning at `step` on."""
        progress = self.progress(step)
        return self.target if progress == 1 else DECAYS[self.decay](self.target, progress)
