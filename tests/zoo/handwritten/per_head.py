"""What each head has one of: weights, modules, scales, gates, sinks; and norms inside a head."""

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

_EXPERTS = 3


class HeadModules(nn.Module):
    """Every head a module with an attention of its own; their contexts lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(OneHead() for _ in range(HEADS))
        self.output = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """One head after the other, and one projection of all."""
        return self.output(torch.cat([head(x) for head in self.heads], dim=-1))


class OneHead(nn.Module):
    """Causal attention with a single head, as tutorials build it first."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (
            nn.Linear(WIDTH, HEAD_DIM, bias=False) for _ in range(3)
        )
        self.register_buffer("mask", torch.tril(torch.ones(32, 32)))

    def forward(self, x: Tensor) -> Tensor:
        """The context (batch, length, head dim)."""
        scores = self.query(x) @ self.key(x).transpose(-2, -1) * HEAD_DIM**-0.5
        length = x.shape[1]
        scores = scores.masked_fill(self.mask[:length, :length] == 0, float("-inf"))
        return scores.softmax(-1) @ self.value(x)


class HeadWeights(SplitHeads):
    """Queries, keys and values of every head come from layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("query", "key", "value"):
            setattr(self, name, SideBySide())


class StackedHeads(nn.Module):
    """Layers of every head, and their results and weights put on top of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = (
            nn.ModuleList(nn.Linear(WIDTH, HEAD_DIM) for _ in range(HEADS)) for _ in range(2)
        )
        self.value = nn.ParameterList(torch.randn(HEAD_DIM, WIDTH) for _ in range(HEADS))
        self.output = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Queries and keys are stacked, and the weights of the values."""
        query = torch.stack([layer(x) for layer in self.query], dim=1)
        key = torch.stack([layer(x) for layer in self.key], dim=2).transpose(1, 2)
        value = torch.einsum("bld,hwd->bhlw", x, torch.stack(list(self.value)))
        context = (query @ key.transpose(-2, -1) * HEAD_DIM**-0.5).softmax(-1) @ value
        return self.output(context.transpose(1, 2).flatten(2))


class SideBySide(nn.Module):
    """Layers on one input, their results concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, HEAD_DIM) for _ in range(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, heads · head dim)."""
        return torch.cat([layer(x) for layer in self.layers], dim=-1)


class Scale(SplitHeads):
    """A learned temperature per head on normalised queries and keys, as Swin v2 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.randn(HEADS, 1, 1))

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Cosines times the head's temperature."""
        cosines = nn.functional.normalize(query, dim=-1) @ nn.functional.normalize(
            key, dim=-1
        ).transpose(-1, -2)
        return cosines * self.logit_scale.clamp(max=4.6).exp()


class Gate(SplitHeads):
    """A learned gate per head on the context."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(HEADS))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend, then gate."""
        return super().attend(query, key, value) * self.gate.sigmoid().view(1, HEADS, 1, 1)


class InputGate(SplitHeads):
    """A gate per head and position, computed from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then gate with what the input says."""
        query, key, value = (
            self.split(linear(x), HEADS) for linear in (self.query, self.key, self.value)
        )
        gate = self.gate(x).sigmoid().transpose(1, 2).unsqueeze(-1)
        return self.output(merge_heads(self.attend(query, key, value) * gate))


class Sink(SplitHeads):
    """A learned logit per head that takes part in the softmax and attends to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax over the keys and the sink, then drop the sink."""
        scores = self.scores(query, key)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(-1)
        return weights[..., :-1] @ value


class QueryKeyNorm(SplitHeads):
    """Queries and keys normalised inside each head, with weights that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.query_norm, self.key_norm = nn.RMSNorm(HEAD_DIM), nn.LayerNorm(HEAD_DIM)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores of the normalised queries and keys."""
        return super().scores(self.query_norm(query), self.key_norm(key))


class ContextNorm(SplitHeads):
    """The context normalised inside each head: what one head holds does not touch another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HEAD_DIM)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend, then normalise."""
        return self.norm(super().attend(query, key, value))


class RoutedOutput(SplitHeads):
    """Every head has output projections of its own, which a router weighs (SwitchHead)."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(HEADS, _EXPERTS, HEAD_DIM, WIDTH) * 0.1)
        self.output = nn.Identity()
        self.router = nn.Linear(WIDTH, HEADS * _EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        """One sum over heads, experts and channels."""
        query, key, value = (
            self.split(projection(x), HEADS) for projection in (self.query, self.key, self.value)
        )
        context = self.attend(query, key, value)
        gates = self.router(x).sigmoid().unflatten(-1, (HEADS, _EXPERTS))
        return torch.einsum("bhtd,hedw,bthe->btw", context, self.experts, gates)


def _stack(attention: type[nn.Module]) -> Example:
    return Stack(lambda: Layer(attention())), (hidden_states(),)


@expects(attentions=2, prunable=2)
def head_modules() -> Example:
    """Attentions of one head before a common output projection."""
    return _stack(HeadModules)


@expects(attentions=2, prunable=2)
def head_weights() -> Example:
    """Concatenated before they are split into heads."""
    return _stack(HeadWeights)


@expects(attentions=2, prunable=2)
def head_stack() -> Example:
    """Stacked instead."""
    return _stack(StackedHeads)


@expects(attentions=2, prunable=2)
def head_scale() -> Example:
    """Temperatures."""
    return _stack(Scale)


@expects(attentions=2, prunable=2)
def head_gate() -> Example:
    """Learned gates."""
    return _stack(Gate)


@expects(attentions=2, prunable=2)
def head_input_gate() -> Example:
    """Computed gates."""
    return _stack(InputGate)


@expects(attentions=2, prunable=2)
def head_sink() -> Example:
    """Sinks."""
    return _stack(Sink)


@expects(attentions=2, prunable=2)
def routed_output() -> Example:
    """Experts in place of an output projection."""
    return _stack(RoutedOutput)


@expects(attentions=2, prunable=2)
def query_key_norm() -> Example:
    """Norms before the scores."""
    return _stack(QueryKeyNorm)


@expects(attentions=2, prunable=2)
def context_norm() -> Example:
    """A norm after the values, inside each head."""
    return _stack(ContextNorm)


ENTRIES: tuple[Entry, ...] = (
    context_norm,
    head_gate,
    head_input_gate,
    head_modules,
    head_scale,
    head_sink,
    head_stack,
    head_weights,
    query_key_norm,
    routed_output,
)
