"""Positions: ALiBi, relative bias tables, window attention, rotary embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tests.zoo.handwritten.common import (
    BATCH,
    HEAD_DIM,
    HEADS,
    WIDTH,
    Entry,
    Example,
    FeedForward,
    Layer,
    SplitHeads,
    Stack,
    expects,
    hidden_states,
    merge_heads,
    token_ids,
)

__all__ = ["ENTRIES"]

_BUCKETS = 9
_WINDOW, _IMAGE = 3, 6


class Alibi(SplitHeads):
    """Slopes computed from the number of heads: they must be selected, not computed anew."""

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores minus slope times distance."""
        slopes = 2.0 ** (-8 / HEADS * torch.arange(1, 1 + HEADS))
        places = torch.arange(query.shape[2])
        distance = (places[:, None] - places[None, :]).abs()
        return super().scores(query, key) - slopes[:, None, None] * distance


class BiasedAttention(SplitHeads):
    """Attention that takes a bias and, as T5 has it, does not scale."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Attend with the bias added to the scores."""
        query, key, value = (
            self.split(linear(x), HEADS) for linear in (self.query, self.key, self.value)
        )
        context = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        return self.output(merge_heads(context))


class BiasTable(nn.Module):
    """One learned bias per bucket of distances and head."""

    def __init__(self) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(_BUCKETS, HEADS)

    def forward(self, length: int) -> Tensor:
        """The bias (1, heads, length, length)."""
        places = torch.arange(length)
        half = _BUCKETS // 2
        buckets = (places[:, None] - places[None, :]).clamp(-half, half) + half
        return self.relative_attention_bias(buckets).permute(2, 0, 1).unsqueeze(0)


class SharedBias(nn.Module):
    """A T5 encoder: the first layer owns the table that every layer uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, WIDTH)
        self.tables = nn.ModuleList((BiasTable(), nn.Identity()))
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.attentions = nn.ModuleList(BiasedAttention() for _ in range(2))
        self.feed_forwards = nn.ModuleList(FeedForward() for _ in range(2))

    def forward(self, words: Tensor) -> Tensor:
        """Hidden states of the words."""
        x = self.embedding(words)
        bias = self.tables[0](words.shape[1])
        layers = zip(self.norms, self.attentions, self.feed_forwards, strict=True)
        for norm, attention, feed_forward in layers:
            x = x + attention(norm(x), bias)
            x = x + feed_forward(x)
        return x


class WindowAttention(SplitHeads):
    """Swin's: attention inside windows that sit in the batch dimension, with a bias per head."""

    def __init__(self) -> None:
        super().__init__()
        side = 2 * _WINDOW - 1
        self.table = nn.Parameter(torch.randn(side * side, HEADS))
        cells = torch.cartesian_prod(torch.arange(_WINDOW), torch.arange(_WINDOW))
        offsets = cells[:, None] - cells[None, :] + _WINDOW - 1
        self.register_buffer("index", (offsets[..., 0] * side + offsets[..., 1]).flatten())

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores plus the bias of the relative position."""
        area = _WINDOW * _WINDOW
        bias = self.table[self.index].view(area, area, HEADS).permute(2, 0, 1).contiguous()
        return super().scores(query, key) + bias.unsqueeze(0)


class WindowLayer(nn.Module):
    """Cut an image (batch, height, width, channels) into windows, attend in each, put it back."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = WindowAttention()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        """Attend in (shifted) windows."""
        batch, height, width, channels = x.shape
        rows, columns = height // _WINDOW, width // _WINDOW
        rolled = self.norm(x).roll((-self.shift, -self.shift), (1, 2))
        cut = rolled.view(batch, rows, _WINDOW, columns, _WINDOW, channels)
        windows = cut.permute(0, 1, 3, 2, 4, 5).reshape(-1, _WINDOW * _WINDOW, channels)
        attended = self.attention(windows)
        cut = attended.view(batch, rows, columns, _WINDOW, _WINDOW, channels)
        merged = cut.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)
        return x + merged.roll((self.shift, self.shift), (1, 2))


class RotaryHalf(SplitHeads):
    """Llama's rotary embedding: the second half of a head is rotated into the first."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Rotate queries and keys, then attend causally."""
        query, key = self.rotate(query), self.rotate(key)
        return scaled_dot_product_attention(query, key, value, is_causal=True)

    def rotate(self, x: Tensor) -> Tensor:
        """x · cos + rotated x · sin."""
        angles = _angles(x.shape[2])
        angles = torch.cat((angles, angles), -1)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


class RotaryInterleaved(RotaryHalf):
    """GPT-J's rotary embedding: neighbours are rotated into each other."""

    def rotate(self, x: Tensor) -> Tensor:
        """Each pair of neighbours times a rotation."""
        angles = _angles(x.shape[2])
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _angles(length: int) -> Tensor:
    frequencies = 10_000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return torch.arange(length)[:, None] * frequencies


@expects(attentions=2, prunable=2)
def alibi() -> Example:
    """Slopes from `arange`."""
    return Stack(lambda: Layer(Alibi()), embed=True), (token_ids(),)


@expects(attentions=2, prunable=2)
def t5_bias() -> Example:
    """A bias table owned by the first layer."""
    return SharedBias(), (token_ids(),)


@expects(attentions=2, prunable=2)
def swin() -> Example:
    """Windows, then shifted windows."""
    image = torch.randn(BATCH, _IMAGE, _IMAGE, WIDTH)
    return nn.Sequential(WindowLayer(0), WindowLayer(1)), (image,)


@expects(attentions=2, prunable=2)
def rotary_half() -> Example:
    """Rotate-half rotary embeddings."""
    return Stack(lambda: Layer(RotaryHalf())), (hidden_states(),)


@expects(attentions=2, prunable=2)
def rotary_interleaved() -> Example:
    """Interleaved rotary embeddings."""
    return Stack(lambda: Layer(RotaryInterleaved())), (hidden_states(),)


ENTRIES: tuple[Entry, ...] = (alibi, rotary_half, rotary_interleaved, swin, t5_bias)
