"""Fewer key and value heads than query heads, in every spelling."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tests.zoo.handwritten.common import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    Entry,
    Example,
    Layer,
    SplitHeads,
    Stack,
    expects,
    hidden_states,
)

__all__ = ["ENTRIES"]

_GROUP = HEADS // KV_HEADS


class Grouped(SplitHeads):
    """Two query heads per key head; subclasses say how the keys reach the queries."""

    kv_heads = KV_HEADS


class RepeatInterleave(Grouped):
    """`repeat_interleave`: 0 0 1 1."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Repeat, then attend."""
        key, value = (x.repeat_interleave(_GROUP, dim=1) for x in (key, value))
        return scaled_dot_product_attention(query, key, value)


class Expand(Grouped):
    """`expand` and `reshape`, as transformers does it: 0 0 1 1."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Expand, merge, then attend."""
        key, value = (
            x[:, :, None].expand(-1, -1, _GROUP, -1, -1).reshape(query.shape) for x in (key, value)
        )
        return super().attend(query, key, value)


class Tiled(Grouped):
    """`repeat`: 0 1 0 1, another map from query heads to key heads."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Tile, then attend."""
        return super().attend(query, *(x.repeat(1, _GROUP, 1, 1) for x in (key, value)))


class Native(Grouped):
    """`enable_gqa=True`: the operator itself repeats."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Leave it to the operator."""
        return scaled_dot_product_attention(query, key, value, enable_gqa=True)


class Broadcast(Grouped):
    """Queries viewed as (groups, queries per group): no key is ever repeated."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend in five dimensions."""
        grouped = query.unflatten(1, (KV_HEADS, _GROUP))
        scores = torch.einsum("bgrqd,bgkd->bgrqk", grouped, key) * HEAD_DIM**-0.5
        return torch.einsum("bgrqk,bgkd->bgrqd", scores.softmax(-1), value).flatten(1, 2)


class MultiQuery(SplitHeads):
    """One key head that broadcasts over all query heads."""

    kv_heads = 1


def _stack(attention: type[nn.Module]) -> Example:
    return Stack(lambda: Layer(attention())), (hidden_states(),)


@expects(attentions=2, prunable=2)
def gqa_repeat_interleave() -> Example:
    """Repeated keys."""
    return _stack(RepeatInterleave)


@expects(attentions=2, prunable=2)
def gqa_expand() -> Example:
    """Expanded keys."""
    return _stack(Expand)


@expects(attentions=2, prunable=2)
def gqa_tiled() -> Example:
    """Tiled keys."""
    return _stack(Tiled)


@expects(attentions=2, prunable=2)
def gqa_native() -> Example:
    """SDPA's own grouping."""
    return _stack(Native)


@expects(attentions=2, prunable=2)
def gqa_broadcast() -> Example:
    """Grouped queries."""
    return _stack(Broadcast)


@expects(attentions=2, prunable=2)
def mqa_broadcast() -> Example:
    """A single key head."""
    return _stack(MultiQuery)


ENTRIES: tuple[Entry, ...] = (
    gqa_broadcast,
    gqa_expand,
    gqa_native,
    gqa_repeat_interleave,
    gqa_tiled,
    mqa_broadcast,
)
