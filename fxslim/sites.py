"""Sites: the attentions of a program, each prunable or with the reason why not.

An attention is a core (scores from two activations, normalised along the key length, summed with a
third) between projections.  Its *head axes* are leaves of the probabilities that come out of the
query's or key's projection.  It is prunable if they are free: read by nobody as a whole, and summed
over only by output projections that the core's context reaches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from fxslim.analysis import AxisMap
from fxslim.axes import Axis
from fxslim.calls import Contraction

__all__ = ["Attention", "AttentionSite", "Head", "Located", "Projection", "Unit"]


Unit = Literal["group", "query", "any"]
"""What goes at a time where query heads share a KV head; see `fxslim.plan`."""


@dataclass(frozen=True)
class Projection:
    """A weight that carries heads.

    Attributes:
        weight: the weight's name in the model's state dict.
        bias: the bias's name, if there is one.
        dim: the dimension of the weight that carries the heads.
        index: LongTensor (heads, positions per head): positions of each head along `dim`; key and
            value projections count KV heads.
    """

    weight: str
    bias: str | None
    dim: int
    index: torch.Tensor = field(repr=False, compare=False)


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
    def projections(self) -> tuple[Projection, ...]:
        """All weights that carry the heads."""
        return (*self.query, *self.key, *self.value, *self.output)


Head = dict[Axis, int]
"""A head by its coordinates along the head axes."""


@dataclass(frozen=True)
class Attention:
    """A site with its place in the graph: what the passes need beyond the plain data.

    Attributes:
        heads: the coordinates of each head.
        units: for each head, the free axis along which it is removed.
        within: the axis of the query heads within a KV group, if each group can keep others.
        ends: the uses (user, operand, dimension) at which the context's heads are summed over.
    """

    site: AttentionSite
    heads: tuple[Head, ...]
    units: tuple[Axis, ...]
    within: Axis | None
    ends: tuple[tuple[fx.Node, Contraction], ...]


@dataclass(frozen=True)
class Located:
    """All attentions of a program and the axis map that they refer to."""

    axis_map: AxisMap
    attentions: tuple[Attention, ...]

    @property
    def sites(self) -> list[AttentionSite]:
        """The plain data of every attention."""
        return [attention.site for attention in self.attentions]
