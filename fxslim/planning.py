"""Planning: from scores and a target to the heads that stay.  Read `plan` top to bottom."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, get_args

import torch

from fxslim.constraints import Constraints, allowed_units, held_heads
from fxslim.costs import Costs
from fxslim.errors import PlanError, check_choice
from fxslim.plan import PruningPlan
from fxslim.scores import Scores
from fxslim.selection import Problem, select
from fxslim.sites import Site, Unit
from fxslim.targets import Scope, Target, check_reachable, in_scope, target_of
from fxslim.units import Coupled, Head, couple

__all__ = ["check_costs", "check_target", "plan"]


def plan(
    scores: Mapping[str, torch.Tensor],
    sites: Sequence[Site],
    sparsity: float | None = None,
    *,
    budget: float | None = None,
    costs: Costs | None = None,
    scope: Scope = "global",
    unit: Unit = "group",
    min_heads: int = 1,
    constraints: Constraints | None = None,
) -> PruningPlan:
    """Choose the heads that matter least, whole units at a time.

    Args:
        scores: for each prunable site, a tensor (heads,); higher stays.  With a `matrix`
            (`fxslim.Scores`), the heads go that matter least together, by the matrix alone.
        sites: what `fxslim.find_attention` returned.
        sparsity: the share of prunable heads to remove, in [0, 1); never more is removed.  0.5, if
            there is no budget.
        budget: in place of a sparsity: what the slim model may cost, at most, as a share of what
            the dense model costs; no more is removed than that needs.
        costs: what each site costs (`fxslim.cost`), for a budget; with a sparsity, the plan says
            what it reaches.
        scope: "global" compares all sites, "local" removes the same share of every site, "uniform"
            leaves every site the same number of heads (smaller ones whole).
        unit: what goes at a time where query heads share a KV head.  "group" removes a KV head with
            all of its query heads; "query" removes one query head of every KV head at a time, the
            lowest of each, and keeps all KV heads; sites that are not `uneven` lose groups.  "any"
            removes any query heads, if `sites` were found with ``unit="any"``.
        min_heads: heads that stay in every site, at least.  0 lets a whole attention go.
        constraints: what else has to hold; see `fxslim.Constraints`.

    Raises:
        ValueError, TypeError: a bad argument, or a score that is missing, misshapen or not finite.
        PlanError: no site is prunable, or the budget or the constraints cannot be met; says what
            can.
    """
    check_target(sparsity, scope, unit, min_heads, budget, constraints)
    check_costs(costs, budget, unit)
    if budget is None and sparsity is None:
        sparsity = 0.5
    constraints = constraints or Constraints()
    prunable = [site for site in sites if site.prunable]
    if not prunable:
        raise PlanError("no site is prunable" + "".join(f"\n  {s.name}: {s.reason}" for s in sites))
    by_head = {(s.name, h): v for s in prunable for h, v in enumerate(_checked(scores, s))}
    matrix = _interactions(scores, list(by_head))
    held = held_heads(constraints, sites)
    coupled = couple(prunable, unit, by_head, held)
    allowed = [allowed_units(choice, constraints, min_heads, held) for choice in coupled]
    target = target_of(coupled, sparsity, budget, costs)
    allowed = in_scope(scope, coupled, allowed, held, target)
    check_reachable(allowed, target, costs)
    removed = select(_problem(coupled, by_head, matrix, held, allowed, target))
    gone = {
        head
        for choice, row in zip(coupled, removed.tolist(), strict=True)
        for unit_heads, goes in zip(choice.units, row, strict=False)
        if goes
        for head in unit_heads
    }
    kept = {s.name: [h for h in range(s.size) if (s.name, h) not in gone] for s in prunable}
    made = PruningPlan.of(kept, sites, costs)
    numbers = [len(c.units) - n for c, n in zip(coupled, removed.sum(1).tolist(), strict=True)]
    _say_shortfall(
        made,
        target,
        target.cost(numbers),
        stuck=scope == "global"
        and not any(any(row[:number]) for row, number in zip(allowed, numbers, strict=True)),
    )
    return made


def check_target(
    sparsity: Any,
    scope: Any,
    unit: Any,
    min_heads: Any,
    budget: Any = None,
    constraints: Any = None,
) -> None:
    """Refuse a target that means nothing.

    Raises:
        TypeError, ValueError: names the argument and quotes what was given.
    """
    for name, value in (("sparsity", sparsity), ("budget", budget), ("min_heads", min_heads)):
        if value is not None and not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, not {value!r}")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), not {sparsity}")
    if budget is not None and not 0 < budget <= 1:
        raise ValueError(f"budget must be in (0, 1], not {budget}")
    if sparsity is not None and budget is not None:
        raise ValueError(f"give a sparsity or a budget, not both ({sparsity} and {budget})")
    check_choice("scope", scope, get_args(Scope))
    check_choice("unit", unit, get_args(Unit))
    if min_heads < 0:
        raise ValueError(f"min_heads must be 0 or more, not {min_heads}")
    if constraints is not None and not isinstance(constraints, Constraints):
        raise TypeError(f"constraints must be fxslim.Constraints, not {type(constraints).__name__}")


def check_costs(costs: Any, budget: Any, unit: Any) -> None:
    """Refuse costs that do not go with a target.

    Raises:
        TypeError, ValueError: they are none, or those of another unit; or a budget has none.
    """
    if budget is not None and costs is None:
        raise ValueError(
            "a budget needs costs: pass costs=fxslim.cost(program, 'flops'), or to fxslim.compile "
            "costs='flops'"
        )
    if costs is not None and not isinstance(costs, Costs):
        raise TypeError(f"costs must be fxslim.Costs, not {type(costs).__name__}")
    if costs is not None and costs.unit != unit:
        raise ValueError(f"the costs are those of unit={costs.unit!r}, the plan has {unit!r}")


def _checked(scores: Mapping[str, torch.Tensor], site: Site) -> list[float]:
    if site.name not in scores:
        raise ValueError(f"no scores for site {site.name!r}")
    values = torch.as_tensor(scores[site.name])
    if tuple(values.shape) != (site.size,):
        raise ValueError(
            f"scores of {site.name!r} have shape {tuple(values.shape)}, not ({site.size},)"
        )
    if not values.isfinite().all():
        raise ValueError(f"scores of {site.name!r} are not finite: {values.tolist()}")
    return [float(value) for value in values]


def _problem(
    coupled: Sequence[Coupled],
    scores: Mapping[Head, float],
    matrix: torch.Tensor | None,
    held: Collection[Head],
    allowed: Sequence[Sequence[bool]],
    target: Target,
) -> Problem:
    """The choices as tensors; those with fewer units are filled up with units that stay."""
    width = max(len(choice.units) for choice in coupled)
    units = [(n * width + at, u) for n, c in enumerate(coupled) for at, u in enumerate(c.units)]
    loss = torch.zeros(len(coupled) * width, dtype=torch.float64)
    pairs = None
    if matrix is None:
        loss[[at for at, _ in units]] = _doubles(sum(scores[h] for h in unit) for _, unit in units)
    else:
        pairs = _between(units, list(scores), matrix, len(loss))
        loss += pairs.diagonal()
        pairs = 2 * pairs.fill_diagonal_(0.0)
    loss[[at for at, unit in units if any(head in held for head in unit)]] = math.inf
    fits = torch.zeros(len(coupled), width + 1, dtype=torch.bool)
    cost = torch.zeros(len(coupled), width + 1, dtype=torch.float64)
    for n, (row, costs) in enumerate(zip(allowed, target.rows, strict=True)):
        fits[n, : len(row)] = torch.tensor(row)
        cost[n, : len(row)] = _doubles(costs)
    sizes = torch.tensor([len(choice.units) for choice in coupled])
    loss = loss.view(len(coupled), width).where(torch.arange(width) < sizes[:, None], math.inf)
    return Problem(loss, pairs, sizes, fits, cost, target.lower, target.upper)


def _doubles(values: Iterable[float]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def _between(
    units: Sequence[tuple[int, tuple[Head, ...]]],
    heads: Sequence[Head],
    matrix: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """(size, size): the sums of the matrix over the heads of each two units, by their places."""
    row = {head: number for number, head in enumerate(heads)}
    members = [(at, row[head]) for at, unit in units for head in unit]
    places, rows = torch.tensor(members).unbind(1)
    half = matrix.new_zeros(size, len(heads)).index_add_(0, places, matrix[rows])
    return matrix.new_zeros(size, size).index_add_(1, places, half[:, rows])


def _interactions(scores: Mapping[str, torch.Tensor], heads: Sequence[Head]) -> torch.Tensor | None:
    """The matrix of `scores` for these heads, if there is one.

    Raises:
        ValueError: it is not finite.
    """
    matrix = scores.matrix if isinstance(scores, Scores) else None
    if matrix is None:
        return None
    if not matrix.isfinite().all():
        raise ValueError("the matrix of the scores is not finite")
    every = [(name, head) for name, values in scores.items() for head in range(len(values))]
    row = {head: number for number, head in enumerate(every)}
    rows = torch.tensor([row[head] for head in heads])
    return matrix.detach().cpu().double()[rows][:, rows]


def _say_shortfall(made: PruningPlan, target: Target, cost: float, *, stuck: bool) -> None:
    """Warn where heads were to go and none goes, or no more can go although they were to."""
    heads = sum(map(len, made.kept.values()))
    if target.share is not None and target.share < 1 and not made.sparsity:
        said = (
            f"no head was removed: {target.asked} of {heads} heads is less than what goes "
            "together, or min_heads or the constraints keep it"
        )
    elif stuck and cost > target.upper:
        said = (
            f"{target.asked} is not reached: min_heads and the constraints keep {heads} heads, so "
            f"it is {made.sparsity:.3f}"
        )
    else:
        return
    warnings.warn(f"fxslim.plan: {said}", stacklevel=3)
