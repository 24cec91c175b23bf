"""Constraints: which numbers of heads a site may keep, and which heads stay whatever they score."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from fxslim.errors import PlanError
from fxslim.sites import Site
from fxslim.units import Coupled, Head

__all__ = ["Constraints", "Share", "allowed_units", "held_heads"]

Share = float | Mapping[str, float]
"""A share of the heads of every site, or of the sites whose names match a pattern."""


@dataclass(frozen=True)
class Constraints:
    """What a plan keeps to besides its target.  Patterns are those of `fnmatch`, on site names.

    Attributes:
        min_share: the share of a site's heads that stays, at least: a number, or one by pattern.
        max_share: the share that stays, at most.
        multiple_of: the heads that a site keeps are a multiple of this, for tensor parallelism or
            the tiles of a kernel.  Query heads are counted; a site with a number of heads that is
            no multiple loses some.
        exclude: patterns of sites to leave as they are, whatever the other constraints say.
        keep: by pattern, heads that stay.

    Where several patterns match a site, all of them hold.

    Raises:
        TypeError, ValueError: names the field and quotes what was given.
    """

    min_share: Share = 0.0
    max_share: Share = 1.0
    multiple_of: int = 1
    exclude: Sequence[str] = ()
    keep: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, share in (("min_share", self.min_share), ("max_share", self.max_share)):
            for value in share.values() if isinstance(share, Mapping) else (share,):
                _check_number(name, value, float, 1.0)
        _check_number("multiple_of", self.multiple_of, int, math.inf)
        if isinstance(self.exclude, str):
            raise TypeError(f"exclude must be a sequence of patterns, not {self.exclude!r}")
        if not isinstance(self.keep, Mapping):
            raise TypeError(f"keep must map patterns to heads, not be {self.keep!r}")


def _check_number(name: str, value: Any, kind: type[float], most: float) -> None:
    least = 0 if kind is float else 1
    if not isinstance(value, (int, kind)):
        raise TypeError(f"{name} must be a {'' if least == 0 else 'whole '}number, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be in [{least}, {most:g}], not {value!r}")


def held_heads(constraints: Constraints, sites: Sequence[Site]) -> set[Head]:
    """The heads that stay in any case.

    Raises:
        PlanError: a pattern matches no site, or a head does not exist.
    """
    held: set[Head] = set()
    for pattern in constraints.exclude:
        for site in _matching(pattern, sites):
            held.update((site.name, head) for head in range(site.size))
    for pattern, heads in constraints.keep.items():
        for site in _matching(pattern, sites):
            if not set(heads) <= set(range(site.size)):
                raise PlanError(
                    f"{site.name!r} has heads 0 to {site.size - 1}; keep has {list(heads)}"
                )
            held.update((site.name, head) for head in heads)
    for share in (constraints.min_share, constraints.max_share):
        for pattern in share if isinstance(share, Mapping) else ():
            _matching(pattern, sites)
    return held


def _matching(pattern: str, sites: Sequence[Site]) -> list[Site]:
    found = [site for site in sites if fnmatchcase(site.name, pattern)]
    if not found:
        known = ", ".join(site.name for site in sites)
        raise PlanError(f"the pattern {pattern!r} matches no site; the sites are: {known}")
    return found


def allowed_units(
    coupled: Coupled, constraints: Constraints, min_heads: int, held: Collection[Head]
) -> list[bool]:
    """Whether so many units (0, 1, ... all) may stay.

    Raises:
        PlanError: no number may; says which each of the constraints allows.
    """
    stay = sum(any(head in held for head in unit) for unit in coupled.units)
    numbers = range(len(coupled.units) + 1)
    if any(_is_excluded(site, constraints) for site in coupled.sites):
        return [number == len(coupled.units) for number in numbers]
    rules = [
        (said, site, list(map(test, coupled.fewest(site), coupled.most(site))))
        for site in coupled.sites
        for said, test in _rules(site, constraints, min_heads)
    ]
    rules += [(f"keep={dict(constraints.keep)}", coupled.sites[0], [n >= stay for n in numbers])]
    allowed = [all(allows[n] for _, _, allows in rules) for n in numbers]
    if not any(allowed):
        lines = [
            f"\n  {said} allows {_listed(coupled.most(site), allows)} of {site.size} heads"
            for said, site, allows in rules
            if not all(allows)
        ]
        raise PlanError(f"no number of heads is allowed in {coupled.name!r}:" + "".join(lines))
    return allowed


_Test = Callable[[int, int], bool]


def _rules(site: Site, constraints: Constraints, min_heads: int) -> Iterator[tuple[str, _Test]]:
    """Each constraint in words, and as a test of how many heads stay at least and at most."""
    total, multiple = site.size, constraints.multiple_of
    least = max(_shares(constraints.min_share, site), default=0.0)
    most = min(_shares(constraints.max_share, site), default=1.0)
    yield f"min_heads={min_heads}", lambda low, _: low >= min(min_heads, total)
    yield f"min_share={least}", lambda low, _: low >= least * total - 1e-9
    yield f"max_share={most}", lambda _, high: high <= most * total + 1e-9
    yield f"multiple_of={multiple}", lambda low, high: low % multiple == high % multiple == 0


def _shares(share: Share, site: Site) -> list[float]:
    """The shares that hold for a site."""
    if not isinstance(share, Mapping):
        return [share]
    return [value for pattern, value in share.items() if fnmatchcase(site.name, pattern)]


def _is_excluded(site: Site, constraints: Constraints) -> bool:
    return any(fnmatchcase(site.name, pattern) for pattern in constraints.exclude)


def _listed(heads: Sequence[int], allows: Sequence[bool]) -> str:
    found = [str(count) for count, allowed in zip(heads, allows, strict=True) if allowed]
    return ", ".join(found) or "none"
