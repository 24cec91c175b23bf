"""Coupling: attentions along the same head axes lose the same heads, or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fxslim.axes import Axis, Block, Dim, block, leaves, resolve
from fxslim.placed import Attention
from fxslim.site_builder import SiteBuilder

__all__ = ["agreed", "coupled"]

_OTHERWISE = "groups it otherwise than another attention does"


def agreed(builders: Sequence[SiteBuilder]) -> list[Attention]:
    """The attentions, cut along axes that mean the same to all that have them.

    Of a head's axes that one goes along which most attentions share keys and values.  Where two
    still differ, neither has a head axis to cut: positions would go that the other one keeps.
    """
    carriers = Counter(axis for builder in builders for axis in builder.carried)
    while True:
        attentions = [builder.build(carriers) for builder in builders]
        clashing = list(_clashing(attentions))
        if not clashing:
            return attentions
        for one, other in clashing:
            block((*_axes(one), *_axes(other)), Block(_OTHERWISE, other.site.cores[0]))


def coupled(attentions: Sequence[Attention]) -> list[Attention]:
    """The attentions, each told which others are cut along the same axis."""
    users: dict[Axis, list[str]] = {}
    for attention in attentions:
        for axis in dict.fromkeys(attention.units):
            users.setdefault(axis, []).append(attention.site.name)
    out = []
    for attention in attentions:
        names = [n for axis in dict.fromkeys(attention.units) for n in users[axis]]
        others = tuple(n for n in dict.fromkeys(names) if n != attention.site.name)
        out.append(replace(attention, site=replace(attention.site, coupled=others)))
    return out


def _clashing(attentions: Sequence[Attention]) -> Iterator[tuple[Attention, Attention]]:
    """Attentions with an axis that one of them may be cut along, and the other one not alike."""
    first: dict[Axis, Attention] = {}
    for attention in attentions:
        for axis in _axes(attention):
            other = first.setdefault(axis, attention)
            if _cut_along(other, axis) != _cut_along(attention, axis):
                yield other, attention


def _axes(attention: Attention) -> tuple[Axis, ...]:
    """The axes that tell its heads apart, and what its output projection sums over with them."""
    heads = dict.fromkeys(axis for head in attention.heads for axis in head)
    ends = (leaf for _, c in attention.ends for leaf in _with(c.dim, set(heads)))
    return tuple(dict.fromkeys((*heads, *ends)))


def _with(dim: Dim, heads: set[Axis]) -> Iterator[Axis]:
    """The leaves of `dim` but those of parts that lie beside the ones with the heads."""
    for axis in resolve(dim):
        if axis.parts is None:
            yield axis
        own = [part for part in axis.parts or () if heads.intersection(leaves(part))]
        for part in own or axis.parts or ():
            yield from _with(part, heads)


def _cut_along(attention: Attention, axis: Axis) -> str:
    """What goes with a position of `axis`: a unit of heads, a head of every unit, or nothing."""
    if axis in attention.units:
        return "unit"
    return "head" if axis is attention.within else ""
