"""Keeping: a plan in terms of axes, which is what narrowing takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fxslim.axes import Axis
from fxslim.errors import PlanError
from fxslim.locate import locate_parts
from fxslim.placed import Located, Placed
from fxslim.plan import PruningPlan, check_plan
from fxslim.positions import Keep, Uneven
from fxslim.sites import AttentionSite, FeedForwardSite, Site

__all__ = ["attentions_of", "feed_forwards_of", "keep_of", "located_for", "sites_of"]


def attentions_of(located: Mapping[str, Located]) -> list[AttentionSite]:
    """The attentions of all parts."""
    return [placed.site for part in located.values() for placed in part.attentions]


def feed_forwards_of(located: Mapping[str, Located]) -> list[FeedForwardSite]:
    """The feed-forward blocks of all parts, where they were looked for."""
    return [placed.site for part in located.values() for placed in part.feed_forwards]


def sites_of(located: Mapping[str, Located]) -> list[Site]:
    """Attentions, and then feed-forward blocks."""
    return [*attentions_of(located), *feed_forwards_of(located)]


def located_for(program: nn.Module, plan: PruningPlan) -> dict[str, Located]:
    """The sites with the units that the plan needs: single query heads only if it must."""
    located = locate_parts(program)
    blocks = not plan.kept.keys() <= {site.name for site in attentions_of(located)}
    if blocks:
        located = locate_parts(program, feed_forward=True)
    try:
        check_plan(plan, sites_of(located))
    except PlanError:
        singles = locate_parts(program, unit="any", feed_forward=blocks)
        if any(len(unit) == 1 for site in attentions_of(singles) for unit in site.unit):
            return singles
    return located


def keep_of(located: Located, plan: PruningPlan) -> Keep:
    """The plan in terms of axes: for each axis that narrows, the coordinates that stay."""
    keep: dict[Axis, Sequence[int] | Uneven] = {}
    for placed in located.placed:
        kept = plan.kept.get(placed.site.name)
        if kept is None or len(kept) == placed.site.size:
            continue
        for axis in dict.fromkeys(placed.units):
            on_axis = (number for number in kept if placed.units[number] is axis)
            keep[axis] = sorted({placed.heads[number][axis] for number in on_axis})
        if placed.within is not None:
            keep |= _within_groups(placed, kept)
    return keep


def _within_groups(placed: Placed[Site], kept: Sequence[int]) -> dict[Axis, Uneven]:
    """The query heads that stay in each KV group that stays; nothing if all of them do."""
    group, within = placed.units[0], placed.within
    assert within is not None
    rows: dict[int, list[int]] = {}
    for head in (placed.heads[number] for number in sorted(kept)):
        rows.setdefault(head[group], []).append(head[within])
    whole = all(len(row) == within.size for row in rows.values())
    in_order = {coordinate: sorted(rows[coordinate]) for coordinate in sorted(rows)}
    return {} if whole else {within: Uneven(group, in_order)}
