"""Units: the heads that go at a time, over all sites that must keep the same heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from fxslim.sites import Site, Unit

__all__ = ["Coupled", "couple"]

Head = tuple[str, int]
"""A head by its site's name and its number."""


@dataclass(frozen=True)
class Coupled:
    """Sites that keep the same heads; mostly it is one site.

    Attributes:
        sites: in the order of their names.
        units: what goes at a time; a head is in one of them.
    """

    sites: tuple[Site, ...]
    units: tuple[tuple[Head, ...], ...]

    @property
    def name(self) -> str:
        """The name of the first site."""
        return self.sites[0].name

    def is_held(self, held: Collection[Head]) -> bool:
        """Whether no unit can go, because a head of each is among `held`."""
        return all(any(head in held for head in heads) for heads in self.units)

    def fewest(self, site: Site) -> list[int]:
        """How many heads of `site` are in so many units (0, 1, ...), at least."""
        return [0, *accumulate(sorted(self._sizes(site)))]

    def most(self, site: Site) -> list[int]:
        """How many heads of `site` are in so many units, at most: the same, if all are alike."""
        return [0, *accumulate(sorted(self._sizes(site), reverse=True))]

    def _sizes(self, site: Site) -> list[int]:
        return [sum(name == site.name for name, _ in heads) for heads in self.units]


def couple(
    sites: Sequence[Site],
    unit: Unit,
    scores: Mapping[Head, float],
    held: Collection[Head] = (),
) -> list[Coupled]:
    """The prunable sites by what must keep the same heads, in the order of their names.

    Args:
        sites: prunable ones.
        unit: see `fxslim.plan`.
        scores: of each head; ranks the query heads that go together where `unit` is "query".
        held: heads that stay; of the query heads of a group, they go last.
    """
    by_name = {site.name: site for site in sites}
    done: set[str] = set()
    found = []
    for name in sorted(by_name):
        if name in done:
            continue
        together = tuple(by_name[n] for n in sorted({name, *by_name[name].coupled}))
        done.update(site.name for site in together)
        columns: Mapping[str, _Column] = {site.name: site.unit for site in together}
        alike = len({len(heads) for site in together for heads in site.unit}) == 1
        if unit == "query" and alike and all(site.uneven for site in together):
            columns = _rounds(columns, scores, held)
        rows = zip(*columns.values(), strict=True)
        units = tuple(
            tuple((n, head) for n, heads in zip(columns, row, strict=True) for head in heads)
            for row in rows
        )
        found.append(Coupled(together, units))
    return found


_Column = Sequence[tuple[int, ...]]


def _rounds(
    columns: Mapping[str, _Column], scores: Mapping[Head, float], held: Collection[Head]
) -> dict[str, _Column]:
    """The lowest query head of every group, then the second lowest, and so on.

    Coupled sites lose the heads at the same places, so they are ranked together.
    """
    groups = next(iter(columns.values()))
    numbers, width = range(len(groups)), len(groups[0])

    def rank(group: int, place: int) -> tuple[bool, float]:
        heads = [(name, column[group][place]) for name, column in columns.items()]
        return any(head in held for head in heads), sum(scores[head] for head in heads)

    ranked = [sorted(range(width), key=partial(rank, n)) for n in numbers]
    return {
        name: tuple(tuple(column[n][ranked[n][r]] for n in numbers) for r in range(width))
        for name, column in columns.items()
    }
