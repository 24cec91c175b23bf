"""Ridge regression from streamed rows: normal equations in float64, strength by held-out error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Moments", "Regression", "fit"]

STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge strengths to choose from, as shares of the features' mean square."""


class Moments:
    """Sums of products of features (rows, K) and targets (rows, N), however many rows come.

    Attributes:
        rows: how many came.
        features: Σ xᵀx, (K + 1, K + 1) in float64: the last feature is the constant 1.
        cross: Σ xᵀy, (K + 1, N).
        targets: Σ y², a number.
    """

    def __init__(self, features: int, targets: int, device: torch.device | str = "cpu") -> None:
        self.rows = 0
        self.features = torch.zeros(features + 1, features + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(features + 1, targets, dtype=torch.float64, device=device)
        self.targets = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Count the rows of `x` (rows, K) and `y` (rows, N)."""
        x, y = x.double(), y.double()
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self.rows += len(x)
        self.features += x.mT @ x
        self.cross += x.mT @ y
        self.targets += y.square().sum()

    def __add__(self, other: Moments) -> Moments:
        total = Moments(len(self.features) - 1, self.cross.shape[1], self.features.device)
        total.rows = self.rows + other.rows
        total.features = self.features + other.features
        total.cross = self.cross + other.cross
        total.targets = self.targets + other.targets
        return total

    def error(self, solution: torch.Tensor) -> float:
        """Σ (y − x·solution)² over the rows, by the moments; solution (K + 1, N)."""
        quadratic = (solution * (self.features @ solution)).sum()
        return float(self.targets - 2 * (solution * self.cross).sum() + quadratic)


@dataclass(frozen=True)
class Regression:
    """What was fitted.

    Attributes:
        weight: (K, N) in float64.
        bias: (N,); what it was where none is fitted.
        strength: the ridge strength that was chosen; infinite where nothing beat what was there.
        before: mean squared error over the held-out rows before, a row.
        after: the same with what was fitted to the other rows.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    strength: float
    before: float
    after: float


def fit(
    train: Moments, held_out: Moments, weight: torch.Tensor, bias: torch.Tensor, *, intercept: bool
) -> Regression:
    """Refit `weight` (K, N) and, with `intercept`, `bias` (N,): ridge toward what they are.

    Minimises ‖y − xW − b‖² + s·‖W − W₀‖², whose solution is W₀ + (XᵀX + s)⁻¹Xᵀ(y − xW₀).  Every
    strength is fitted to `train` and judged on `held_out`; the best is fitted to both.
    """
    start = torch.cat([weight.double(), bias.double()[None]])
    before = held_out.error(start)
    fitted = _ridges(train, start, STRENGTHS, intercept=intercept)
    errors = {s: held_out.error(solution) for s, solution in fitted}
    best = min(errors, key=errors.__getitem__)
    rows = max(held_out.rows, 1)
    if not errors[best] < before:
        return Regression(start[:-1], start[-1], float("inf"), before / rows, before / rows)
    ((_, solution),) = _ridges(train + held_out, start, [best], intercept=intercept)
    return Regression(solution[:-1], solution[-1], best, before / rows, errors[best] / rows)


def _ridges(
    moments: Moments, start: torch.Tensor, strengths: Sequence[float], *, intercept: bool
) -> Iterator[tuple[float, torch.Tensor]]:
    """Each strength with its solution (K + 1, N); the last row, the bias, is not held back."""
    missing = moments.cross - moments.features @ start
    square = moments.features.diagonal()[:-1].mean().clamp_min(torch.finfo(torch.float64).tiny)
    solved = len(start) if intercept else len(start) - 1
    for strength in strengths:
        system = moments.features.clone()
        system.diagonal()[:-1] += strength * square
        solution = start.clone()
        solution[:solved] += torch.linalg.solve(system[:solved, :solved], missing[:solved])
        yield strength, solution
