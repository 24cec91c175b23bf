"""Plans: which heads each site keeps.  Plain data, made from scores under a target."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from fxslim.errors import PlanError, UnsupportedSite
from fxslim.sites import AttentionSite, Unit

__all__ = ["PruningPlan", "Scope", "check_plan", "check_target", "plan"]

Scope = Literal["global", "local", "uniform"]


@dataclass(frozen=True)
class PruningPlan:
    """Which heads stay.

    Attributes:
        kept: for each site by name, the numbers of the heads that stay, ascending.
        sparsity: the share of prunable heads that go.
    """

    kept: dict[str, list[int]]
    sparsity: float

    def to_json(self) -> str:
        """The plan as JSON, one site a line."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read back what `to_json` wrote.

        Raises:
            PlanError: the text is no plan.
        """
        try:
            data = json.loads(text)
            kept = {str(name): [int(h) for h in heads] for name, heads in data["kept"].items()}
            return cls(kept, float(data["sparsity"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PlanError(
                f"this is no pruning plan ({type(error).__name__}: {error}); "
                'expected {"kept": {site: [head, ...]}, "sparsity": number}'
            ) from error


@dataclass(frozen=True)
class _Unit:
    """Heads that go together, over all sites that are coupled."""

    heads: tuple[tuple[str, tuple[int, ...]], ...]
    score: float

    @property
    def count(self) -> int:
        return sum(len(numbers) for _, numbers in self.heads)


def plan(
    scores: Mapping[str, torch.Tensor],
    sites: Sequence[AttentionSite],
    sparsity: float = 0.5,
    *,
    scope: Scope = "global",
    unit: Unit = "group",
    min_heads: int = 1,
) -> PruningPlan:
    """Choose the heads with the lowest scores, whole units at a time.

    Args:
        scores: for each prunable site, a tensor (heads,); higher stays.
        sites: what `fxslim.find_attention` returned.
        sparsity: the share of prunable heads to remove, in [0, 1); never more is removed.
        scope: "global" compares all sites, "local" removes the same share of every site, "uniform"
            leaves every site the same number of heads.
        unit: what goes at a time where query heads share a KV head.  "group" removes a KV head with
            all of its query heads; "query" removes one query head of every KV head at a time, the
            lowest of each, and keeps all KV heads; sites that are not `uneven` lose groups.  "any"
            removes any query heads, if `sites` were found with ``unit="any"``.
        min_heads: heads that stay in every site, at least.  0 lets a whole attention go.

    Raises:
        ValueError: a bad argument, or a score that is missing, misshapen or not finite.
        PlanError: no site is prunable.
    """
    check_target(sparsity, scope, unit, min_heads)
    prunable = [site for site in sites if site.prunable]
    if not prunable:
        raise PlanError("no site is prunable" + "".join(f"\n  {s.name}: {s.reason}" for s in sites))
    units = _units(prunable, {s.name: _checked(scores, s) for s in prunable}, unit)
    heads = {site.name: site.num_heads for site in prunable}
    left = dict(heads)
    floor = _floors(heads, units, sparsity, scope, min_heads)
    budget = math.floor(sparsity * sum(heads.values()) + 1e-9)
    gone: set[tuple[str, int]] = set()
    for lowest in sorted(units, key=lambda u: u.score):
        fits = all(left[name] - len(numbers) >= floor[name] for name, numbers in lowest.heads)
        if fits and lowest.count <= budget:
            budget -= lowest.count
            for name, numbers in lowest.heads:
                left[name] -= len(numbers)
                gone.update((name, number) for number in numbers)
    kept = {n: [h for h in range(count) if (n, h) not in gone] for n, count in heads.items()}
    return PruningPlan(kept, len(gone) / sum(heads.values()))


def check_target(sparsity: Any, scope: Any, unit: Any, min_heads: Any) -> None:
    """Refuse a target that means nothing.

    Raises:
        TypeError, ValueError: names the argument and quotes what was given.
    """
    for name, value in (("sparsity", sparsity), ("min_heads", min_heads)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, not {value!r}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), not {sparsity}")
    for name, value, known in (("scope", scope, Scope), ("unit", unit, Unit)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, not {value!r}")
    if min_heads < 0:
        raise ValueError(f"min_heads must be 0 or more, not {min_heads}")


def _checked(scores: Mapping[str, torch.Tensor], site: AttentionSite) -> list[float]:
    if site.name not in scores:
        raise ValueError(f"no scores for site {site.name!r}")
    values = torch.as_tensor(scores[site.name])
    if tuple(values.shape) != (site.num_heads,):
        raise ValueError(
            f"scores of {site.name!r} have shape {tuple(values.shape)}, not ({site.num_heads},)"
        )
    if not values.isfinite().all():
        raise ValueError(f"scores of {site.name!r} are not finite: {values.tolist()}")
    return [float(value) for value in values]


def _units(
    sites: Sequence[AttentionSite], scores: Mapping[str, list[float]], unit: Unit
) -> list[_Unit]:
    """Every unit once; its score is the mean over its heads, so that large ones compare fairly."""
    by_name = {site.name: site for site in sites}
    done: set[str] = set()
    units = []
    for site in sites:
        if site.name in done:
            continue
        together = [by_name[name] for name in (site.name, *site.coupled)]
        done.update(s.name for s in together)
        groups: _Groups = {s.name: s.unit for s in together}
        if unit == "query" and all(s.uneven for s in together):
            groups = _rounds(groups, scores)
        for number in range(len(groups[site.name])):
            heads = tuple((name, groups[name][number]) for name in groups)
            units.append(_Unit(heads, _mean(heads, scores)))
    return units


_Groups = Mapping[str, tuple[tuple[int, ...], ...]]


def _rounds(groups: _Groups, scores: Mapping[str, list[float]]) -> _Groups:
    """The lowest query head of every group, then the second lowest, and so on.

    Coupled sites lose the heads at the same places, so they are ranked together.
    """
    numbers, width = range(len(next(iter(groups.values())))), len(next(iter(groups.values()))[0])
    ranked = []
    for n in numbers:
        score = [_mean([(s, (g[n][i],)) for s, g in groups.items()], scores) for i in range(width)]
        ranked.append(sorted(range(width), key=score.__getitem__))
    return {
        name: tuple(tuple(units[n][ranked[n][rank]] for n in numbers) for rank in range(width))
        for name, units in groups.items()
    }


def _mean(heads: Sequence[tuple[str, tuple[int, ...]]], scores: Mapping[str, list[float]]) -> float:
    values = [scores[name][head] for name, numbers in heads for head in numbers]
    return sum(values) / len(values)


def _floors(
    heads: Mapping[str, int], units: Sequence[_Unit], sparsity: float, scope: str, min_heads: int
) -> dict[str, int]:
    """How many heads each site keeps at least."""
    if scope == "local":
        share = {name: math.ceil(count * (1 - sparsity) - 1e-9) for name, count in heads.items()}
    elif scope == "uniform":
        count = math.ceil(sum(heads.values()) * (1 - sparsity) / len(heads) - 1e-9)
        share = dict.fromkeys(heads, count)
    else:
        share = dict.fromkeys(heads, 0)
    return {name: min(max(share[name], min_heads), heads[name]) for name in heads}


def check_plan(chosen: PruningPlan, sites: Sequence[AttentionSite]) -> None:
    """Refuse a plan that does not fit the sites.

    Raises:
        PlanError: an unknown site, a head that does not exist or comes twice, part of a unit, or
            coupled sites that keep different heads.
        UnsupportedSite: the plan removes heads of a site that is not prunable; says why.
    """
    by_name = {site.name: site for site in sites}
    for name, kept in chosen.kept.items():
        if name not in by_name:
            known = ", ".join(by_name) or "none"
            raise PlanError(f"the plan names site {name!r}; the sites are: {known}")
        site = by_name[name]
        if sorted(set(kept)) != sorted(kept) or not set(kept) <= set(range(site.num_heads)):
            raise PlanError(f"{name!r} has heads 0 to {site.num_heads - 1}, the plan keeps {kept}")
        if len(kept) == site.num_heads:
            continue
        if not site.prunable:
            raise UnsupportedSite(f"{name!r} cannot be pruned: {site.reason}")
        _check_units(site, kept)
        _check_coupled(chosen, site, by_name)


def _check_units(site: AttentionSite, kept: Sequence[int]) -> None:
    """Whole units stay; or, where the site is uneven, as many heads of every unit that stays."""
    left = [len(set(unit) & set(kept)) for unit in site.unit]
    if site.uneven:
        if len(set(left) - {0}) > 1:
            raise PlanError(
                f"the KV groups of {site.name!r} that stay must keep as many query heads each; "
                f"the plan keeps {left} of the groups {[list(unit) for unit in site.unit]}"
            )
        return
    for unit, count in zip(site.unit, left, strict=True):
        if 0 < count < len(unit):
            raise PlanError(
                f"heads {list(unit)} of {site.name!r} go together; the plan keeps {list(kept)}"
            )


def _check_coupled(
    chosen: PruningPlan, site: AttentionSite, by_name: Mapping[str, AttentionSite]
) -> None:
    kept = _kept_places(site, chosen)
    for other in site.coupled:
        if _kept_places(by_name[other], chosen) != kept:
            raise PlanError(
                f"{site.name!r} and {other!r} share weights, so they must keep the same heads"
            )


def _kept_places(site: AttentionSite, chosen: PruningPlan) -> list[list[int]]:
    """For each unit, which of its heads stay."""
    kept = set(chosen.kept.get(site.name, range(site.num_heads)))
    return [[i for i, head in enumerate(unit) if head in kept] for unit in site.unit]
