"""Attention as `torch.nn` writes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.handwritten.common import (
    CONTEXT,
    FEED_FORWARD,
    HEADS,
    INNER,
    SEQUENCE,
    Entry,
    Example,
    expects,
    hidden_states,
)

__all__ = ["ENTRIES"]

_OTHER_WIDTH = 20


class SelfAttention(nn.Module):
    """Two residual `nn.MultiheadAttention`; the attention weights are not asked for."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(INNER, HEADS, batch_first=batch_first) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend twice."""
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


class CrossAttention(nn.Module):
    """Two residual `nn.MultiheadAttention` from a sequence to a context."""

    def __init__(self, *, batch_first: bool, context_width: int = INNER) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(
                INNER, HEADS, batch_first=batch_first, kdim=context_width, vdim=context_width
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend twice to the context."""
        for layer in self.layers:
            x = x + layer(x, context, context, need_weights=False)[0]
        return x


class WeighedAttention(nn.Module):
    """`nn.MultiheadAttention` that computes its weights, and a model that may return them."""

    def __init__(self, *, returned: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(INNER, HEADS, batch_first=True)
        self.returned = returned

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The attended values, and the weights averaged over the heads."""
        attended, weights = self.attention(x, x, x)
        return (attended, weights) if self.returned else attended


class MaskedAttention(nn.Module):
    """`nn.MultiheadAttention` under a causal mask and a padding mask from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(INNER, HEADS, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """Attend to the past that is not padding."""
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.attention(
            x, x, x, attn_mask=future, key_padding_mask=padding, need_weights=False
        )[0]


@expects(attentions=2, prunable=2)
def mha_batch_first() -> Example:
    """Self-attention, batch first."""
    return SelfAttention(batch_first=True), (hidden_states(width=INNER),)


@expects(attentions=2, prunable=2)
def mha_sequence_first() -> Example:
    """Self-attention, sequence first: batch and heads share a dimension."""
    return SelfAttention(batch_first=False), (hidden_states(width=INNER).transpose(0, 1),)


@expects(attentions=2, prunable=2)
def mha_cross_batch_first() -> Example:
    """Cross-attention with one packed weight, which export cuts into q and k‖v."""
    inputs = (hidden_states(width=INNER), hidden_states(CONTEXT, INNER))
    return CrossAttention(batch_first=True), inputs


@expects(attentions=2, prunable=2)
def mha_cross_sequence_first() -> Example:
    """The same, sequence first."""
    inputs = (hidden_states(width=INNER), hidden_states(CONTEXT, INNER))
    return CrossAttention(batch_first=False), tuple(x.transpose(0, 1) for x in inputs)


@expects(attentions=2, prunable=2)
def mha_cross_other_width() -> Example:
    """Cross-attention to a narrower context: three weights of their own."""
    inputs = (hidden_states(width=INNER), hidden_states(CONTEXT, _OTHER_WIDTH))
    return CrossAttention(batch_first=True, context_width=_OTHER_WIDTH), inputs


@expects(attentions=1, prunable=1)
def mha_unused_weights() -> Example:
    """Weights computed and dropped: `need_weights` writes the softmax out."""
    return WeighedAttention(returned=False), (hidden_states(width=INNER),)


@expects(attentions=1, prunable=0)
def mha_averaged_weights() -> Example:
    """Weights averaged over the heads and returned: fewer heads would change the average."""
    return WeighedAttention(returned=True), (hidden_states(width=INNER),)


@expects(attentions=1, prunable=1)
def mha_masked() -> Example:
    """A causal mask and a padding mask, merged by torch to one per batch and head."""
    padding = torch.zeros(hidden_states().shape[:2], dtype=torch.bool)
    padding[0, -2:] = True
    return MaskedAttention(), (hidden_states(width=INNER), padding)


@expects(attentions=2, prunable=2)
def transformer_encoder() -> Example:
    """`nn.TransformerEncoder`, batch first."""
    layer = nn.TransformerEncoderLayer(INNER, HEADS, FEED_FORWARD, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return encoder, (hidden_states(width=INNER),)


@expects(attentions=1, prunable=1)
def transformer_encoder_layer() -> Example:
    """`nn.TransformerEncoderLayer`, norm first, sequence first."""
    layer = nn.TransformerEncoderLayer(INNER, HEADS, FEED_FORWARD, norm_first=True)
    return layer, (hidden_states(width=INNER).transpose(0, 1),)


@expects(attentions=2, prunable=2)
def transformer_decoder_layer() -> Example:
    """`nn.TransformerDecoderLayer`: self-attention under a causal mask, then cross-attention."""
    layer = nn.TransformerDecoderLayer(INNER, HEADS, FEED_FORWARD, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(SEQUENCE)
    return layer, (hidden_states(width=INNER), hidden_states(CONTEXT, INNER), mask)


@expects(attentions=6, prunable=6)
def transformer() -> Example:
    """`nn.Transformer`: two encoder layers, two decoder layers of two attentions each."""
    model = nn.Transformer(INNER, HEADS, 2, 2, FEED_FORWARD, batch_first=True)
    return model, (hidden_states(CONTEXT, INNER), hidden_states(width=INNER))


ENTRIES: tuple[Entry, ...] = (
    mha_averaged_weights,
    mha_batch_first,
    mha_cross_batch_first,
    mha_cross_other_width,
    mha_cross_sequence_first,
    mha_masked,
    mha_sequence_first,
    mha_unused_weights,
    transformer,
    transformer_decoder_layer,
    transformer_encoder,
    transformer_encoder_layer,
)
