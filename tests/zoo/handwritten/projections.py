"""Fused, tensor-valued and convolutional projections, and other ways to split the heads."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tests.zoo.handwritten.common import (
    BATCH,
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
    token_ids,
)

__all__ = ["ENTRIES"]

_SCALE = HEAD_DIM**-0.5
_HEIGHT, _WIDTH = 3, 6  # of the images


class Fused(nn.Module):
    """One linear for q, k and v: `parts` cuts its result into three (batch, heads, length, dim)."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * INNER)
        self.c_proj = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Causal attention."""
        query, key, value = self.parts(self.c_attn(x))
        context = scaled_dot_product_attention(query, key, value, is_causal=True)
        batch, length, _ = x.shape
        return self.c_proj(context.transpose(1, 2).contiguous().view(batch, length, INNER))

    def parts(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Blocks q‖k‖v, as nanoGPT has them."""
        shape = (*qkv.shape[:2], HEADS, HEAD_DIM)
        return tuple(part.view(shape).transpose(1, 2) for part in qkv.split(INNER, dim=2))


class FusedManual(Fused):
    """nanoGPT without SDPA: a triangle in a buffer masks the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        """Causal attention by a masked softmax."""
        query, key, value = self.parts(self.c_attn(x))
        length = x.shape[1]
        scores = query @ key.transpose(-2, -1) * _SCALE
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        return self.c_proj(merge_heads(scores.softmax(-1) @ value))


class FusedInterleaved(Fused):
    """Every head's q, k and v side by side, as GPT-NeoX has them."""

    def parts(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Heads outside, parts inside."""
        qkv = qkv.view(*qkv.shape[:2], HEADS, 3 * HEAD_DIM)
        return tuple(part.transpose(1, 2) for part in qkv.chunk(3, dim=-1))


class FusedUnbind(Fused):
    """A dimension of three, unbound, as timm has it."""

    def parts(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """(batch, length, 3, heads, dim) to three of (batch, heads, length, dim)."""
        return qkv.view(*qkv.shape[:2], 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)


class Einops(Fused):
    """`rearrange` in lucidrains' manner."""

    def forward(self, x: Tensor) -> Tensor:
        """Bidirectional attention."""
        query, key, value = (
            rearrange(part, "b n (h d) -> b h n d", h=HEADS)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        weights = (query @ key.transpose(-1, -2) * _SCALE).softmax(dim=-1)
        return self.c_proj(rearrange(weights @ value, "b h n d -> b n (h d)"))


class Einsum(nn.Module):
    """Projections with a head dimension of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (
            nn.Parameter(torch.randn(WIDTH, HEADS, HEAD_DIM) * WIDTH**-0.5) for _ in range(3)
        )
        self.output = nn.Parameter(torch.randn(HEADS, HEAD_DIM, WIDTH) * INNER**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Attention in five einsums."""
        query, key, value = (
            torch.einsum("bsm,mhd->bshd", x, weight)
            for weight in (self.query, self.key, self.value)
        )
        weights = torch.einsum("bqhd,bkhd->bhqk", query, key * _SCALE).softmax(-1)
        context = torch.einsum("bhqk,bkhd->bqhd", weights, value)
        return torch.einsum("bqhd,hdm->bqm", context, self.output)


class MergedBatch(SplitHeads):
    """Batch and heads merged into one dimension for `bmm`, as fairseq has them."""

    def forward(self, x: Tensor) -> Tensor:
        """Attention on (batch · heads, length, head dim)."""
        batch, length, _ = x.shape
        query, key, value = (
            self.split(linear(x), HEADS).reshape(batch * HEADS, length, HEAD_DIM)
            for linear in (self.query, self.key, self.value)
        )
        weights = torch.bmm(query * _SCALE, key.transpose(1, 2)).softmax(-1)
        context = torch.bmm(weights, value).view(batch, HEADS, length, HEAD_DIM)
        return self.output(context.transpose(1, 2).reshape(batch, length, INNER))


class AlongBatch(SplitHeads):
    """Heads cut from the width, side by side along the batch, as Set Transformer has them."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend to heads times batch at once, and put the heads side by side again."""
        projected = self.query(x), self.key(x), self.value(x)
        parts = (torch.cat(flat.split(HEAD_DIM, dim=2)) for flat in projected)
        context = self.attend(*parts)
        return self.output(torch.cat(context.split(x.shape[0]), dim=2))


class OneByOne(SplitHeads):
    """Heads that are picked from their dimension one by one, and put side by side."""

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate what `unbind` gives."""
        query, key, value = (
            self.split(projection(x), HEADS) for projection in (self.query, self.key, self.value)
        )
        return self.output(torch.cat(self.attend(query, key, value).unbind(1), dim=-1))


class ConvAttention(nn.Module):
    """Attention over the pixels of an image: 1x1 convolutions project."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Conv2d(WIDTH, 3 * INNER, 1, bias=False)
        self.to_out = nn.Conv2d(INNER, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, and add to the image."""
        batch, _, height, width = x.shape
        query, key, value = (
            part.reshape(batch, HEADS, HEAD_DIM, height * width)
            for part in self.to_qkv(x).chunk(3, dim=1)
        )
        weights = torch.einsum("bhdi,bhdj->bhij", query * _SCALE, key).softmax(-1)
        context = torch.einsum("bhij,bhdj->bhid", weights, value)
        merged = context.permute(0, 1, 3, 2).reshape(batch, INNER, height, width)
        return x + self.to_out(merged)


class DenoisingAttention(nn.Module):
    """The attention block of DDPM's U-Net: group norm, 1-D convolutions, scale on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(7, WIDTH)
        self.qkv = nn.Conv1d(WIDTH, 3 * INNER, 1)
        self.proj_out = nn.Conv1d(INNER, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the flattened pixels, and add to the image."""
        batch, channels, *spatial = x.shape
        flat = x.reshape(batch, channels, -1)
        qkv = self.qkv(self.norm(flat))
        query, key, value = qkv.reshape(batch * HEADS, 3 * HEAD_DIM, -1).split(HEAD_DIM, dim=1)
        scale = _SCALE**0.5
        weights = torch.einsum("bct,bcs->bts", query * scale, key * scale).softmax(-1)
        context = torch.einsum("bts,bcs->bct", weights, value).reshape(batch, INNER, -1)
        return (flat + self.proj_out(context)).reshape(batch, channels, *spatial)


def _image() -> Tensor:
    return torch.randn(BATCH, WIDTH, _HEIGHT, _WIDTH)


@expects(attentions=2, prunable=2)
def nanogpt() -> Example:
    """A fused linear in blocks, causal SDPA."""
    return Stack(lambda: Layer(Fused()), embed=True), (token_ids(),)


@expects(attentions=2, prunable=2)
def nanogpt_manual() -> Example:
    """A fused linear in blocks, scores masked by a buffer."""
    return Stack(lambda: Layer(FusedManual()), embed=True), (token_ids(),)


@expects(attentions=2, prunable=2)
def fused_interleaved() -> Example:
    """A fused linear with q, k and v per head."""
    return Stack(lambda: Layer(FusedInterleaved()), embed=True), {"x": token_ids()}


@expects(attentions=2, prunable=2)
def fused_unbind() -> Example:
    """A fused linear, permuted and unbound."""
    return Stack(lambda: Layer(FusedUnbind())), (hidden_states(),)


@expects(attentions=2, prunable=2)
def einops_vit() -> Example:
    """A fused linear cut by `rearrange`."""
    return Stack(lambda: Layer(Einops())), (hidden_states(),)


@expects(attentions=2, prunable=2)
def einsum() -> Example:
    """Three-dimensional weights."""
    return Stack(lambda: Layer(Einsum())), (hidden_states(),)


@expects(attentions=2, prunable=2)
def bmm_merged() -> Example:
    """Batch and heads in one dimension."""
    return Stack(lambda: Layer(MergedBatch())), (hidden_states(),)


@expects(attentions=2, prunable=2)
def heads_along_batch() -> Example:
    """Heads cut from the width, side by side along the batch."""
    return Stack(lambda: Layer(AlongBatch())), (hidden_states(),)


@expects(attentions=2, prunable=2)
def heads_one_by_one() -> Example:
    """Heads picked one by one."""
    return Stack(lambda: Layer(OneByOne())), (hidden_states(),)


@expects(attentions=2, prunable=2)
def conv_attention() -> Example:
    """Two image attentions one after the other."""
    return nn.Sequential(ConvAttention(), ConvAttention()), (_image(),)


@expects(attentions=2, prunable=2)
def ddpm_attention() -> Example:
    """Per head q‖k‖v channels, merged with the batch."""
    return nn.Sequential(DenoisingAttention(), DenoisingAttention()), (_image(),)


ENTRIES: tuple[Entry, ...] = (
    bmm_merged,
    conv_attention,
    ddpm_attention,
    einops_vit,
    einsum,
    fused_interleaved,
    fused_unbind,
    heads_along_batch,
    heads_one_by_one,
    nanogpt,
    nanogpt_manual,
)
