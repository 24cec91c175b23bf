"""Selection: which units to remove, so that the least is lost for what is saved.

Tensors only: choices (rows) of units (columns).  A choice keeps some number of its units, one of
those that are allowed, and costs what its row says at that number.  The loss of a removed set is
the sum of its units' losses and, where units interact, of what each pair of them adds.

Units are removed greedily, those first that lose the least for the cost saved; what the target
does not need is restored; then removed units are exchanged for kept ones while the loss falls.
(Kwon et al. 2022 rearrange within a layer; here it is over all choices.)  Ties go to the first, so
the result is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

__all__ = ["Problem", "select"]


@dataclass(frozen=True)
class Problem:
    """What can be removed, what that loses, and what is left to pay.

    Attributes:
        loss: (choices, units) of removing one unit; infinite for units that stay, or are none.
        pairs: (choices · units, choices · units), symmetric, zero on the diagonal: what removing
            two units loses beyond the sum; None if they do not interact.
        units: (choices,) how many there are.
        allowed: (choices, units + 1), whether so many may stay.
        cost: (choices, units + 1), with so many that stay.
        lower, upper: units are removed until the cost is `upper` or less, and never so that it is
            less than `lower`, beyond what has to go because no more is allowed.
    """

    loss: torch.Tensor
    pairs: torch.Tensor | None
    units: torch.Tensor
    allowed: torch.Tensor
    cost: torch.Tensor
    lower: float
    upper: float


def select(problem: Problem) -> torch.Tensor:
    """Which units to remove, bool (choices, units).

    With interactions, the best of three: removed with them in view, or as if there were none, or
    rearranged as if there were none, too; all are rearranged with them in view.  So they never make
    it worse.
    """
    alone = _merged(problem)
    alone.rearrange()
    if problem.pairs is None:
        return alone.removed
    found, merged = _Selection(problem, problem.pairs), _merged(problem)
    found.descend()
    for selection in (merged, alone):
        selection.interact(problem.pairs)
    for selection in (found, merged, alone):
        selection.rearrange()
    return min(found, merged, alone, key=_Selection.quality).removed


def _merged(problem: Problem) -> _Selection:
    """What is removed where units do not interact."""
    selection = _Selection(problem, None)
    selection.merge()
    return selection


class _Selection:
    """Units removed so far, and what one more, or one less, does to the loss."""

    def __init__(self, problem: Problem, pairs: torch.Tensor | None) -> None:
        self.problem, self.pairs = problem, pairs
        self.removed = torch.zeros_like(problem.loss, dtype=torch.bool)
        self.added = torch.zeros_like(problem.loss)  # by interactions with what is removed
        self.kept = problem.units.clone()
        self.choices = torch.arange(len(problem.units))

    def interact(self, pairs: torch.Tensor) -> None:
        """Take interactions into account from now on."""
        self.pairs = pairs
        self.added = pairs[self.removed.flatten()].sum(0).view_as(self.added)

    def total(self) -> float:
        """What is left to pay."""
        return self.problem.cost[self.choices, self.kept].sum().item()

    def quality(self) -> tuple[float, float]:
        """How far above the target, and the loss; less is better."""
        loss = (self.problem.loss + self.added / 2)[self.removed].sum().item()
        return max(self.total() - self.problem.upper, 0.0), loss

    # ------------------------------------------------------------------------------------- phases

    def merge(self) -> None:
        """What `descend` does, where units do not interact: a choice loses them in a known order.

        The steps of all choices are merged by what they lose for what they save; one that comes
        after a dearer one of its choice follows right after that.
        """
        p, total, full = self.problem, self.total(), set[int]()
        steps = [step for n in self.choices.tolist() for step in self._steps(n)]
        gone = [0] * len(p.units)
        for rank, choice, number, saved in sorted(steps, key=lambda step: step[0]):
            if rank > -math.inf and (choice in full or total <= p.upper or total - saved < p.lower):
                full.add(choice)
                continue
            gone[choice] += number
            total -= saved
        order = p.loss.argsort(dim=1, stable=True)
        for row, columns, number in zip(self.removed, order, gone, strict=True):
            row[columns[:number]] = True
        self.kept = p.units - torch.tensor(gone)

    def _steps(self, choice: int) -> list[tuple[float, int, int, float]]:
        """(rank, choice, units, what they save): the steps by which a choice may be narrowed."""
        p = self.problem
        allowed, cost = p.allowed[choice].tolist(), p.cost[choice].tolist()
        size = int(p.units[choice])
        loss = [0.0, *accumulate(p.loss[choice].sort(stable=True).values[:size].tolist())]
        levels = _levels(size, allowed, cost)
        steps, rank = [], -math.inf
        for high, low in pairwise(levels):
            saved = cost[high] - cost[low]
            if allowed[high]:
                rank = max(rank, (loss[size - low] - loss[size - high]) / saved)
            steps.append((rank, choice, high - low, saved))
        return steps

    def descend(self) -> None:
        """Remove units to the target, those first that lose the least for what they save."""
        p = self.problem
        while True:
            total, forced = self.total(), ~p.allowed[self.choices, self.kept]
            if total <= p.upper and not forced.any():
                return
            level = self._below()
            step = self.kept - level
            saved = self._at(self.kept) - self._at(level)
            fits = (level >= 0) & (forced if forced.any() else total - saved >= p.lower)
            if not fits.any():
                return
            loss, units = self._chunks(step.where(fits, 0), self.removed, largest=False)
            choice = int((loss / saved.where(~forced, 1)).where(fits, math.inf).argmin())
            self._toggle(units[choice, : int(step[choice])])

    def rearrange(self) -> None:
        """Restore what the target does not need, then exchange units while the loss falls."""
        while self._restore():
            pass
        while self._exchange():
            pass

    def _restore(self) -> bool:
        """Restore the units of a choice that gain the most for what they cost, if any can be."""
        p, level = self.problem, self._above()
        step, paid = level - self.kept, self._at(level) - self._at(self.kept)
        fits = (level >= 0) & (self.total() + paid <= p.upper)
        gain, units = self._chunks(step.where(fits, 0), ~self.removed, largest=True)
        gain = gain.where(fits, 0)
        choice = int(gain.argmax())
        if gain[choice] <= 0:
            return False
        self._toggle(units[choice, : int(step[choice])])
        return True

    def _exchange(self) -> bool:
        """Try every removed unit for the kept one that is best in its place, the dearest first."""
        p, before = self.problem, self.quality()
        upper = max(p.upper, self.total())
        enough = 1e-9 * p.loss[self.removed].abs().sum().item()
        marginal = (p.loss + self.added).flatten()
        gone = self.removed.flatten().nonzero().flatten()
        kept = (~self.removed).flatten()
        if not len(gone) or not kept.any():
            return False
        if self.pairs is None and marginal[gone].max() <= marginal[kept].min():
            return False
        dearest = gone[marginal[gone].argsort(descending=True, stable=True)].tolist()
        if self.pairs is None:  # of each choice, the others are no better to restore
            dearest = list({unit // p.loss.shape[1]: unit for unit in reversed(dearest)}.values())
        for unit in dearest:
            change = self._changes(unit, upper)
            other = int(change.argmin())
            if change[other] < -enough:
                self._toggle(torch.tensor([unit, other]))
        return self.quality() < before

    # -------------------------------------------------------------------------------------- steps

    def _below(self) -> torch.Tensor:
        """(choices,): the next number that is allowed and costs less; -1 if there is none.

        From a number that is not allowed, the next that is.
        """
        allowed, cost = self.problem.allowed, self.problem.cost
        numbers, kept = torch.arange(cost.shape[1]), self.kept[:, None]
        cheaper = (cost < cost.gather(1, kept)) | ~allowed.gather(1, kept)
        return numbers.where(allowed & cheaper & (numbers < kept), -1).amax(1)

    def _above(self) -> torch.Tensor:
        """(choices,): the next larger number that is allowed; -1 if there is none."""
        size = self.problem.cost.shape[1]
        numbers = torch.arange(size)
        nearest = numbers.where(self.problem.allowed & (numbers > self.kept[:, None]), size).amin(1)
        return nearest.where(nearest < size, -1)

    def _at(self, kept: torch.Tensor) -> torch.Tensor:
        """(choices,): the cost of each with so many units kept."""
        return self.problem.cost[self.choices, kept.clamp_min(0)]

    def _chunks(
        self, step: torch.Tensor, without: torch.Tensor, *, largest: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For each choice, the sum of marginal losses of so many units, and the units, flat."""
        width = max(int(step.max()), 1)
        marginal = self.problem.loss + self.added
        masked = marginal.where(~without, -math.inf if largest else math.inf)
        columns = masked.argsort(dim=1, descending=largest, stable=True)[:, :width]
        inside = torch.arange(width) < step[:, None]
        total = marginal.gather(1, columns).where(inside, 0).sum(1)
        units = columns + self.choices[:, None] * marginal.shape[1]
        if self.pairs is not None and width > 1:
            both = inside[:, :, None] & inside[:, None, :]
            within = self.pairs[units[:, :, None], units[:, None, :]].where(both, 0).sum((1, 2)) / 2
            total = total - within if largest else total + within
        return total, units

    def _changes(self, unit: int, upper: float) -> torch.Tensor:
        """What the loss becomes less by, with each kept unit removed in place of `unit`, flat."""
        p, width = self.problem, self.removed.shape[1]
        own = unit // width
        more, fewer = self.kept[own] + 1, (self.kept - 1).clamp_min(0)
        paid = p.cost[own, more] - p.cost[own, self.kept[own]]
        total = self.total() + paid + self._at(fewer) - self._at(self.kept)
        fits = p.allowed[own, more] & p.allowed[self.choices, fewer] & (self.kept > 0)
        fits &= (total >= p.lower) & (total <= upper)
        fits[own] = True
        marginal = p.loss + self.added
        change = marginal - marginal[own, unit % width]
        if self.pairs is not None:
            change = change - self.pairs[unit].view_as(change)
        return change.where(fits[:, None] & ~self.removed, math.inf).flatten()

    def _toggle(self, units: torch.Tensor) -> None:
        """Remove each unit, or restore it if it is removed."""
        for unit in units.tolist():
            choice, column = divmod(unit, self.removed.shape[1])
            sign = -1 if self.removed[choice, column] else 1
            self.removed[choice, column] = sign > 0
            self.kept[choice] -= sign
            if self.pairs is not None:
                self.added += sign * self.pairs[unit].view_as(self.added)


def _levels(size: int, allowed: Sequence[bool], cost: Sequence[float]) -> list[int]:
    """All units, and then each smaller number that is allowed and costs less than the one before.

    After a number that is not allowed, the next that is.
    """
    levels = [size]
    for number in range(size - 1, -1, -1):
        last = levels[-1]
        if allowed[number] and (cost[number] < cost[last] or not allowed[last]):
            levels.append(number)
    return levels
