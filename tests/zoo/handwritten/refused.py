"""Attentions whose heads cannot be taken away one by one: something reads them together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.handwritten.common import (
    HEAD_DIM,
    HEADS,
    INNER,
    WIDTH,
    Entry,
    Example,
    Layer,
    SplitHeads,
    Stack,
    expects,
    hidden_states,
    merge_heads,
)

__all__ = ["ENTRIES"]


class TalkingHeads(SplitHeads):
    """A linear map across the heads before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mix the scores, then the weights."""
        scores = self.before(self.scores(query, key).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return weights @ value


class NormOverHeads(SplitHeads):
    """A norm over the merged heads before the output projection (BitNet's `attn_sub_norm`)."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Sequential(nn.LayerNorm(INNER), nn.Linear(INNER, WIDTH))


class SoftmaxOverHeads(SplitHeads):
    """Heads that compete: the weights are normalised over the heads as well."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend, then normalise over the heads."""
        weights = self.scores(query, key).softmax(-1)
        return (weights / weights.sum(1, keepdim=True)) @ value


class Returned(nn.Module):
    """A model that returns its attention weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(SplitHeads() for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Hidden states, and the weights of every layer."""
        returned = []
        for layer in self.attentions:
            query, key, value = (
                layer.split(linear(x), HEADS) for linear in (layer.query, layer.key, layer.value)
            )
            weights = layer.scores(query, key).softmax(-1)
            returned.append(weights)
            x = x + layer.output(merge_heads(weights @ value))
        return x, returned


class Unprojected(nn.Module):
    """Attention without an output projection: the context goes into the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(INNER, INNER) for _ in range(3))
        self.norm = nn.LayerNorm(INNER)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, add, normalise."""
        query, key, value = (
            linear(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for linear in self.qkv
        )
        weights = (query @ key.transpose(-1, -2) * HEAD_DIM**-0.5).softmax(-1)
        return self.norm(x + merge_heads(weights @ value))


@expects(attentions=2, prunable=0)
def talking_heads() -> Example:
    """Mixed heads."""
    return Stack(lambda: Layer(TalkingHeads())), (hidden_states(),)


@expects(attentions=2, prunable=0)
def norm_over_heads() -> Example:
    """A norm over the context of all heads."""
    return Stack(lambda: Layer(NormOverHeads())), (hidden_states(),)


@expects(attentions=2, prunable=0)
def softmax_over_heads() -> Example:
    """Weights divided by their sum over the heads."""
    return Stack(lambda: Layer(SoftmaxOverHeads())), (hidden_states(),)


@expects(attentions=2, prunable=0)
def returned_weights() -> Example:
    """Weights among the model's outputs."""
    return Returned(), (hidden_states(),)


@expects(attentions=2, prunable=0)
def unprojected() -> Example:
    """A residual stream of heads."""
    return nn.Sequential(Unprojected(), Unprojected()), (torch.randn(5, 11, INNER),)


@expects(attentions=3, prunable=1)
def one_of_three() -> Example:
    """A prunable attention between two that are not."""
    layers = iter((TalkingHeads, SplitHeads, NormOverHeads))
    return Stack(lambda: Layer(next(layers)()), layers=3), (hidden_states(),)


ENTRIES: tuple[Entry, ...] = (
    norm_over_heads,
    one_of_three,
    returned_weights,
    softmax_over_heads,
    talking_heads,
    unprojected,
)
