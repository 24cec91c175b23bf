"""Targets: how far a plan goes, and what each scope makes of that for each site."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fxslim.costs import Costs
from fxslim.errors import PlanError
from fxslim.units import Coupled, Head

__all__ = ["Scope", "Target", "check_reachable", "in_scope", "target_of"]

Scope = Literal["global", "local", "uniform"]

Allowed = Sequence[Sequence[bool]]
"""For each choice of heads (a `Coupled`), whether so many of its units (0, 1, ...) may stay."""


@dataclass(frozen=True)
class Target:
    """Remove units until the cost is `upper` or less; it must not become less than `lower`.

    Attributes:
        asked: what was asked for, in words.
        share: the share of each site that stays with scope "local", where that is what was asked.
        rows: for each choice, the cost with 0, 1, ... and all of its units.
    """

    asked: str
    share: float | None
    rows: list[list[float]]
    lower: float
    upper: float

    def cost(self, numbers: Sequence[int]) -> float:
        """The cost with so many units of each choice kept."""
        return sum(row[number] for row, number in zip(self.rows, numbers, strict=True))


def target_of(
    coupled: Sequence[Coupled], sparsity: float | None, budget: float | None, costs: Costs | None
) -> Target:
    """The target in terms of units.  A sparsity costs heads, of which no more may go.

    Raises:
        ValueError: `costs` are not those of these sites.
    """
    if budget is not None:
        assert costs is not None
        rows = [_row(costs, choice) for choice in coupled]
        saved = (1 - budget * (1 + 1e-9)) * costs.total()
        upper = sum(row[-1] for row in rows) - saved
        return Target(f"budget={budget}", None, rows, -math.inf, upper)
    assert sparsity is not None
    heads = [[choice.fewest(site) for site in choice.sites] for choice in coupled]
    counts = [[float(sum(at)) for at in zip(*sites, strict=True)] for sites in heads]
    total = sum(row[-1] for row in counts)
    lower = total - math.floor(sparsity * total + 1e-9)
    return Target(f"sparsity={sparsity}", 1 - sparsity, counts, lower, lower)


def _row(costs: Costs, choice: Coupled) -> list[float]:
    """The cost with so many units, at most."""
    site = choice.sites[0]
    row = costs.sites.get(site.name)
    if row is None or len(row) != site.size + 1:
        raise ValueError(
            f"the costs have no row of {site.size + 1} numbers for {site.name!r}; "
            "fxslim.cost makes them for this program and unit"
        )
    return [row[heads] for heads in choice.most(site)]


def in_scope(
    scope: Scope,
    coupled: Sequence[Coupled],
    allowed: Allowed,
    held: Collection[Head],
    target: Target,
) -> list[list[bool]]:
    """What is allowed in this scope: one number for each choice, unless the scope is global.

    Of all ways to keep the same share (or number) everywhere, the first that meets the target;
    where none does, the one that comes nearest.

    Raises:
        PlanError: there is no number that every site may keep.
    """
    if scope == "global":
        return [list(row) for row in allowed]
    if scope == "local":
        ways = _same_share(coupled, allowed, target.share)
    else:
        ways = _same_number(coupled, allowed, held)
    found = None
    for numbers in ways:
        if found is not None and target.cost(numbers) < target.lower:
            break
        found = numbers
        if target.cost(numbers) <= target.upper:
            break
    if found is None:
        names = ", ".join(choice.name for choice in coupled)
        raise PlanError(f"no number of heads is allowed in all of {names}; scope='global' may do")
    return [
        [n == number for n in range(len(row))] for row, number in zip(allowed, found, strict=True)
    ]


def _same_share(
    coupled: Sequence[Coupled], allowed: Allowed, asked: float | None
) -> Iterator[list[int]]:
    """The share that was asked for; else every share, the largest first; rounded up."""
    sizes = {len(choice.units) for choice in coupled}
    every = {number / size for size in sizes for number in range(size + 1)}
    for share in sorted(every, reverse=True) if asked is None else [asked]:
        wanted = [math.ceil(share * len(choice.units) - 1e-9) for choice in coupled]
        yield [_nearest(row, number) for row, number in zip(allowed, wanted, strict=True)]


def _nearest(row: Sequence[bool], wanted: int) -> int:
    """The smallest number from `wanted` that is allowed; the largest if there is none."""
    numbers = [number for number, fits in enumerate(row) if fits]
    return next((number for number in numbers if number >= wanted), numbers[-1])


def _same_number(
    coupled: Sequence[Coupled], allowed: Allowed, held: Collection[Head]
) -> Iterator[list[int]]:
    """Every number of heads that all sites may keep, the largest first.

    Smaller sites stay whole; so do those of which every head is held.
    """
    fitting = [
        {} if choice.is_held(held) else _by_heads(choice, row)
        for choice, row in zip(coupled, allowed, strict=True)
    ]
    for heads in range(max(choice.sites[0].size for choice in coupled), -1, -1):
        numbers = [
            fits.get(min(heads, choice.sites[0].size)) if fits else len(choice.units)
            for choice, fits in zip(coupled, fitting, strict=True)
        ]
        if None not in numbers:
            yield [number for number in numbers if number is not None]


def _by_heads(choice: Coupled, row: Sequence[bool]) -> dict[int, int]:
    """By how many heads of a site stay, the number of units that are so many, where allowed."""
    counts = choice.fewest(choice.sites[0])
    return {heads: number for number, heads in reversed(list(enumerate(counts))) if row[number]}


def check_reachable(allowed: Allowed, target: Target, costs: Costs | None) -> None:
    """Refuse a target that no allowed numbers of units meet.

    Raises:
        PlanError: says what was asked for and what is possible.
    """
    total = target.cost([len(row) - 1 for row in allowed])
    most = target.cost([_nearest(row, len(row)) for row in allowed])
    if most < target.lower:
        raise PlanError(
            f"{target.asked} lets {total - target.lower:g} of {total:g} heads go, but the "
            f"constraints (multiple_of, max_share) make {total - most:g} go"
        )
    least = sum(
        min(cost for cost, fits in zip(row, fit, strict=True) if fits)
        for row, fit in zip(target.rows, allowed, strict=True)
    )
    if costs is not None and target.share is None and least > target.upper:
        share = 1 - (total - least) / costs.total()
        raise PlanError(
            f"{target.asked} cannot be reached: with the fewest heads that the scope and the "
            f"constraints allow, {share:.3f} of the {costs.resource} remain"
        )
