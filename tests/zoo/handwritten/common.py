"""What the hand-written models share: sizes, the record of what is expected, the layers around.

The sizes are pairwise distinct, and the width is not heads times head dim, so that nothing can be
found by size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "BATCH",
    "CONTEXT",
    "FEED_FORWARD",
    "HEADS",
    "HEAD_DIM",
    "INNER",
    "KV_HEADS",
    "SEQUENCE",
    "VOCAB",
    "WIDTH",
    "Entry",
    "Example",
    "FeedForward",
    "Layer",
    "SplitHeads",
    "Stack",
    "expects",
    "hidden_states",
    "merge_heads",
    "token_ids",
]

BATCH, SEQUENCE, CONTEXT = 5, 11, 7
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 12
INNER = HEADS * HEAD_DIM
WIDTH, FEED_FORWARD, VOCAB = 28, 56, 37

Example = tuple[nn.Module, tuple[Any, ...] | dict[str, Any]]
"""A model and its example inputs: a tuple of positional or a dict of keyword arguments."""


@dataclass(frozen=True)
class Entry:
    """A hand-written model and what is true of it; calling it builds it.

    Attributes:
        make: Builds the model and its inputs.
        attentions: How many attentions the model has, one per call site.
        prunable: How many of them can lose heads.
    """

    make: Callable[[], Example]
    attentions: int
    prunable: int

    @property
    def name(self) -> str:
        """The function's name, with hyphens."""
        return self.make.__name__.replace("_", "-")

    def __call__(self) -> Example:
        """The model in eval mode, with the same weights at every call."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model, inputs = self.make()
        return model.eval(), inputs


def expects(*, attentions: int, prunable: int) -> Callable[[Callable[[], Example]], Entry]:
    """Turn a function that builds an example into an `Entry`."""
    return lambda make: Entry(make, attentions, prunable)


def hidden_states(length: int = SEQUENCE, width: int = WIDTH) -> Tensor:
    """Noise of (batch, length, width)."""
    return torch.randn(BATCH, length, width)


def token_ids() -> Tensor:
    """Words of (batch, sequence)."""
    return torch.randint(VOCAB, (BATCH, SEQUENCE))


def merge_heads(context: Tensor) -> Tensor:
    """(batch, heads, length, head dim) to (batch, length, heads · head dim)."""
    return context.transpose(1, 2).flatten(2)


class FeedForward(nn.Sequential):
    """Two linear layers around a GELU."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(nn.Linear(width, FEED_FORWARD), nn.GELU(), nn.Linear(FEED_FORWARD, width))


class Layer(nn.Module):
    """A pre-norm transformer layer around any attention of one argument."""

    def __init__(self, attention: nn.Module, feed_forward: nn.Module | None = None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(WIDTH)
        self.feed_forward = feed_forward or FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        """Attend and feed forward, each added to the residual stream."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Stack(nn.Module):
    """Two layers and a classifier over hidden states or, with `embed`, over token ids."""

    def __init__(
        self, make_layer: Callable[[], nn.Module], *, embed: bool = False, layers: int = 2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH) if embed else nn.Identity()
        self.layers = nn.ModuleList(make_layer() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        """Scores for every word at every position."""
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.norm(x))


class SplitHeads(nn.Module):
    """The ordinary attention, with the steps between as methods for others to replace."""

    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, INNER)
        self.key = nn.Linear(WIDTH, self.kv_heads * HEAD_DIM)
        self.value = nn.Linear(WIDTH, self.kv_heads * HEAD_DIM)
        self.output = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Project, split, attend, merge, project."""
        query = self.split(self.query(x), HEADS)
        key = self.split(self.key(x), self.kv_heads)
        value = self.split(self.value(x), self.kv_heads)
        return self.output(merge_heads(self.attend(query, key, value)))

    def split(self, x: Tensor, heads: int) -> Tensor:
        """(batch, length, heads · head dim) to (batch, heads, length, head dim)."""
        return x.view(x.shape[0], x.shape[1], heads, HEAD_DIM).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax over the keys of the scaled scores, times the values."""
        return self.scores(query, key).softmax(-1) @ value

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Scaled products of queries and keys."""
        return query @ key.transpose(-1, -2) * HEAD_DIM**-0.5
