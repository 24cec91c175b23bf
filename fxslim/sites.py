"""Sites: attentions and feed-forward blocks of a program, prunable or with the reason why not.

An attention is a core (scores from two activations, normalised along the key length, summed with a
third) between projections.  Its *head axes* are leaves of the probabilities that come out of the
query's or key's projection.  It is prunable if they are free: read by nobody as a whole, and summed
over only by output projections that the core's context reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

__all__ = ["AttentionSite", "FeedForwardSite", "Projection", "Site", "Unit"]


Unit = Literal["group", "query", "any"]
"""What goes at a time where query heads share a KV head; see `fxslim.plan`."""


@dataclass(frozen=True)
class Projection:
    """A weight that carries heads, or channels of a feed-forward block.

    Attributes:
        weight: the weight's name in the model's state dict.
        bias: the bias's name, if there is one.
        dim: the dimension of the weight that carries the heads.
        index: LongTensor (rows, positions per head): positions along `dim`, a row for each head
            that has its own; heads that share a KV head share its row in key and value projections.
        row_of: LongTensor (heads,): the row of each (query) head, or channel; -1 where the weight
            carries nothing of it, as where each head has a weight of its own.
    """

    weight: str
    bias: str | None
    dim: int
    index: torch.Tensor = field(repr=False, compare=False)
    row_of: torch.Tensor = field(repr=False, compare=False)


Pairs = tuple[tuple[tuple[Projection, ...], tuple[Projection, ...]], ...]
"""Weights that are multiplied with each other."""


class Site(Protocol):
    """What can lose a part of itself: an attention its heads, a feed-forward block its channels.

    Scores, plans, masks and repair know no more of it than this.
    """

    @property
    def name(self) -> str:
        """What it is called in a plan; unique."""

    @property
    def size(self) -> int:
        """How many heads (or channels) it has."""

    @property
    def unit(self) -> Sequence[tuple[int, ...]]:
        """The heads that go together, as groups of head numbers."""

    @property
    def uneven(self) -> bool:
        """Whether each group can keep other heads, as many as the others keep."""

    @property
    def coupled(self) -> tuple[str, ...]:
        """Names of the sites that must keep the same heads."""

    @property
    def prunable(self) -> bool:
        """Whether heads can be removed."""

    @property
    def reason(self) -> str:
        """Why not, in words, if not."""

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All weights that carry the heads."""

    @property
    def summed_by(self) -> tuple[Projection, ...]:
        """The weights that sum over the heads: output projections."""

    @property
    def products(self) -> Pairs:
        """Pairs of weights that are multiplied with each other, head by head."""


@dataclass(frozen=True)
class AttentionSite:
    """One attention of the model.

    Attributes:
        name: the module path, unique; a layer that is called several times is numbered.
        kind: "mha", "gqa" (several query heads share a KV head) or "mqa" (all share one).
        is_cross: keys come from another sequence than queries.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: the width of a query head.
        query, key, value, output: the weights that carry the heads.
        unit: the heads that go together, as groups of head numbers.
        uneven: whether each of those groups can keep other query heads, as many as the others keep.
        coupled: names of the sites that must keep the same heads (their weights are shared).
        prunable: whether heads can be removed.
        reason: why not, in words, if not.
        cores: names of the graph's nodes that normalise the scores.
    """

    name: str
    kind: str
    is_cross: bool
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query: tuple[Projection, ...]
    key: tuple[Projection, ...]
    value: tuple[Projection, ...]
    output: tuple[Projection, ...]
    unit: tuple[tuple[int, ...], ...]
    uneven: bool
    coupled: tuple[str, ...]
    prunable: bool
    reason: str
    cores: tuple[str, ...]

    @property
    def size(self) -> int:
        """The number of (query) heads."""
        return self.num_heads

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All weights that carry the heads."""
        return (*self.query, *self.key, *self.value, *self.output)

    @property
    def summed_by(self) -> tuple[Projection, ...]:
        """The output projections."""
        return self.output

    @property
    def products(self) -> Pairs:
        """Output times value, and query times key projections."""
        return ((self.output, self.value), (self.query, self.key))


@dataclass(frozen=True)
class FeedForwardSite:
    """The channels of a feed-forward block; a layer that is called several times is one site.

    Attributes:
        name: the path of the down projection, unique.
        channels: how many there are between the projections.
        up: the weights that bring the channels in: up and gate projections.
        down: the weights that sum over them.
        prunable: whether channels can be removed.
        reason: why not, in words, if not.
    """

    name: str
    channels: int
    up: tuple[Projection, ...]
    down: tuple[Projection, ...]
    prunable: bool
    reason: str

    @property
    def size(self) -> int:
        """The number of channels."""
        return self.channels

    @property
    def unit(self) -> Sequence[tuple[int, ...]]:
        """Every channel goes by itself."""
        return [(channel,) for channel in range(self.channels)]

    @property
    def uneven(self) -> bool:
        """Channels have no groups."""
        return False

    @property
    def coupled(self) -> tuple[str, ...]:
        """None: blocks that share weights are one site."""
        return ()

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All weights that carry the channels."""
        return (*self.up, *self.down)

    @property
    def summed_by(self) -> tuple[Projection, ...]:
        """The down projections."""
        return self.down

    @property
    def products(self) -> Pairs:
        """Down times up projections."""
        return ((self.down, self.up),)
