"""The plan: which heads each site keeps.  Plain data, checked against the sites."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from fxslim.costs import Costs
from fxslim.errors import PlanError, UnsupportedSite
from fxslim.sites import Site

__all__ = ["PruningPlan", "check_plan", "with_channels"]


@dataclass(frozen=True)
class PruningPlan:
    """Which heads stay; of feed-forward blocks, which channels.

    Attributes:
        kept: for each site by name, the numbers of the heads that stay, ascending.
        sparsity: the share of prunable heads that go.
        reached: what the slim model costs as a share of the dense one, by resource, where the costs
            were given; "channels" are those of feed-forward blocks, where these were pruned.
    """

    kept: dict[str, list[int]]
    sparsity: float
    reached: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        kept: Mapping[str, Sequence[int]],
        sites: Sequence[Site],
        costs: Costs | None = None,
    ) -> PruningPlan:
        """The plan that keeps these heads; prunable sites that are not named stay whole.

        ``PruningPlan.of(plan.kept | {"layers.0": [0, 3]}, sites)`` is `plan` edited by hand.

        Raises:
            PlanError, UnsupportedSite: the heads do not fit the sites, or `costs` other sites.
        """
        whole = {s.name: list(range(s.size)) for s in sites if s.prunable}
        chosen = whole | {name: sorted(heads) for name, heads in kept.items()}
        heads = sum(map(len, whole.values()))
        gone = sum(len(whole[name]) - len(chosen[name]) for name in whole)
        reached: dict[str, float] = {} if costs is None else {costs.resource: costs.share(chosen)}
        made = cls(chosen, gone / heads if heads else 0.0, reached)
        check_plan(made, sites)
        return made

    def to_json(self) -> str:
        """The plan as JSON, one head a line."""
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
            reached = {str(name): float(cost) for name, cost in data.get("reached", {}).items()}
            return cls(kept, float(data["sparsity"]), reached)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PlanError(
                f"this is no pruning plan ({type(error).__name__}: {error}); "
                'expected {"kept": {site: [head, ...]}, "sparsity": number}'
            ) from error


def with_channels(
    heads: PruningPlan, channels: PruningPlan, costs: Costs | None = None
) -> PruningPlan:
    """A plan for attentions and one for feed-forward blocks, as one, and what it reaches."""
    kept = heads.kept | channels.kept
    reached: dict[str, float] = {} if costs is None else {costs.resource: costs.share(kept)}
    reached["channels"] = 1 - channels.sparsity
    return PruningPlan(kept, heads.sparsity, reached)


def check_plan(chosen: PruningPlan, sites: Sequence[Site]) -> None:
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
        if sorted(set(kept)) != sorted(kept) or not set(kept) <= set(range(site.size)):
            raise PlanError(f"{name!r} has heads 0 to {site.size - 1}, the plan keeps {kept}")
        if len(kept) == site.size:
            continue
        if not site.prunable:
            raise UnsupportedSite(f"{name!r} cannot be pruned: {site.reason}")
        _check_units(site, kept)
        _check_coupled(chosen, site, by_name)


def _check_units(site: Site, kept: Sequence[int]) -> None:
    """Whole units stay; or, where the site is uneven, as many heads of every unit that stays."""
    stay = set(kept)
    left = [len(stay.intersection(unit)) for unit in site.unit]
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


def _check_coupled(chosen: PruningPlan, site: Site, by_name: Mapping[str, Site]) -> None:
    """The same units stay; of units with as many heads, the same of these."""
    kept = _kept_places(site, chosen)
    for other in (by_name[name] for name in site.coupled):
        theirs = _kept_places(other, chosen)
        if list(map(len, site.unit)) == list(map(len, other.unit)):
            same = kept == theirs
        else:
            same = list(map(bool, kept)) == list(map(bool, theirs))
        if not same:
            raise PlanError(
                f"{site.name!r} and {other.name!r} share weights, so they must keep the same heads"
            )


def _kept_places(site: Site, chosen: PruningPlan) -> list[list[int]]:
    """For each unit, which of its heads stay."""
    kept = set(chosen.kept.get(site.name, range(site.size)))
    return [[i for i, head in enumerate(unit) if head in kept] for unit in site.unit]
