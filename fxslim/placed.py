"""Placed: sites with their place in the graph, which the passes need beyond the plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

import torch
from torch import fx

from fxslim.analysis import AxisMap
from fxslim.axes import Axis, Dim, size
from fxslim.calls import Contraction
from fxslim.positions import coordinates
from fxslim.sites import AttentionSite, FeedForwardSite, Site

__all__ = ["Along", "Attention", "FeedForward", "Head", "Located", "Placed", "positions_along"]

Head = dict[Axis, int]
"""A head by its coordinates along the head axes."""


class Along(Sequence[Head]):
    """Heads that are the positions of one axis; a block may have thousands."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def __len__(self) -> int:
        return self._axis.size

    @overload
    def __getitem__(self, number: int) -> Head: ...

    @overload
    def __getitem__(self, number: slice) -> Sequence[Head]: ...

    def __getitem__(self, number: int | slice) -> Head | Sequence[Head]:
        positions = range(self._axis.size)[number]
        if isinstance(positions, range):
            return [{self._axis: position} for position in positions]
        return {self._axis: positions}


S_co = TypeVar("S_co", bound=Site, covariant=True)


@dataclass(frozen=True)
class Placed(Generic[S_co]):
    """A site with its place in the graph.

    Attributes:
        heads: the coordinates of each head.
        units: for each head, the free axis along which it is removed.
        within: the axis of the query heads within a KV group, if each group can keep others.
        ends: the uses (user, operand, dimension) at which the context's heads are summed over.
    """

    site: S_co
    heads: Sequence[Head]
    units: Sequence[Axis]
    within: Axis | None
    ends: tuple[tuple[fx.Node, Contraction], ...]


Attention = Placed[AttentionSite]
FeedForward = Placed[FeedForwardSite]


@dataclass(frozen=True)
class Located:
    """All attentions of a program and the axis map that they refer to.

    Attributes:
        axis_map: what every dimension is made of.
        attentions: in the order of the graph.
        feed_forwards: the feed-forward blocks, where they were looked for.
    """

    axis_map: AxisMap
    attentions: tuple[Attention, ...]
    feed_forwards: tuple[FeedForward, ...] = ()

    @property
    def sites(self) -> list[AttentionSite]:
        """The plain data of every attention."""
        return [attention.site for attention in self.attentions]

    @property
    def every_site(self) -> list[Site]:
        """The plain data of attentions and feed-forward blocks."""
        return [placed.site for placed in self.placed]

    @property
    def placed(self) -> tuple[Placed[Site], ...]:
        """Attentions and feed-forward blocks."""
        return (*self.attentions, *self.feed_forwards)


def positions_along(
    heads: Sequence[Head],
    carried: Sequence[Axis],
    dim: Dim,
    without: Sequence[Axis] = (),
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(rows, positions per head) of `dim`, and for each head the number of its row, or -1.

    Heads that `carried` does not tell apart share a row; those of which `dim` has nothing have
    none.  None where some heads have fewer positions than others.
    """
    own = [tuple(head.get(leaf, -1) for leaf in carried) for head in heads]
    rows: dict[tuple[int, ...], list[int]] = {
        coordinate: [] for coordinate in own if max(coordinate) >= 0
    }
    columns = [coordinates(dim, leaf) for leaf in carried]
    free = set(range(size(dim))).difference(
        *([at for at, c in enumerate(coordinates(dim, leaf)) if c >= 0] for leaf in without)
    )
    for position, coordinate in enumerate(zip(*columns, strict=True)):
        if coordinate in rows and position in free:
            rows[coordinate].append(position)
    rows = {coordinate: row for coordinate, row in rows.items() if row}
    widths = {len(row) for row in rows.values()}
    if len(widths) != 1:
        return None
    (width,) = widths
    number = {coordinate: n for n, coordinate in enumerate(rows)}
    index = torch.tensor(list(rows.values()), dtype=torch.long).reshape(len(rows), width)
    return index, torch.tensor([number.get(coordinate, -1) for coordinate in own])
