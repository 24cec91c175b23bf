"""Keeping: a plan in terms of axes, which is what narrowing takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fxslim.axes import Axis
from fxslim.errors import PlanError
from fxslim.locate import locate_parts
from fxslim.plan import PruningPlan, check_plan
from fxslim.positions import Keep, Uneven
from fxslim.sites import Attention, AttentionSite, Located

__all__ = ["keep_of", "located_for", "sites_of"]


def located_for(program: nn.Module, plan: PruningPlan) -> dict[str, Located]:
    """The attentions with the units that the plan needs: single query heads only if it must."""
    located = locate_parts(program)
    try:
        check_plan(plan, sites_of(located))
    except PlanError:
        singles = locate_parts(program, unit="any")
        if any(len(unit) == 1 for site in sites_of(singles) for unit in site.unit):
            return singles
    return located


def sites_of(located: Mapping[str, Located]) -> list[AttentionSite]:
    """The sites of all parts."""
    return [site for part in located.values() for site in part.sites]


def keep_of(located: Located, plan: PruningPlan) -> Keep:
    """The plan in terms of axes: for each axis that narrows, the coordinates that stay."""
    keep: dict[Axis, Sequence[int] | Uneven] = {}
    for attention in located.attentions:
        kept = plan.kept.get(attention.site.name)
        if kept is None or len(kept) == attention.site.num_heads:
            continue
        for axis in dict.fromkeys(attention.units):
            on_axis = [n for n, unit in enumerate(attention.units) if unit is axis]
            keep[axis] = sorted({attention.heads[n][axis] for n in on_axis if n in set(kept)})
        if attention.within is not None:
            keep |= _within_groups(attention, kept)
    return keep


def _within_groups(attention: Attention, kept: Sequence[int]) -> dict[Axis, Uneven]:
    """The query heads that stay in each KV group that stays; nothing if all of them do."""
    group, within = attention.units[0], attention.within
    assert within is not None
    rows: dict[int, list[int]] = {}
    for head in (attention.heads[number] for number in sorted(kept)):
        rows.setdefault(head[group], []).append(head[within])
    whole = all(len(row) == within.size for row in rows.values())
    in_order = {coordinate: sorted(rows[coordinate]) for coordinate in sorted(rows)}
    return {} if whole else {within: Uneven(group, in_order)}
