"""Ordinary attentions in other arrangements: parallel, shared, and in the company of more."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.zoo.handwritten.common import (
    BATCH,
    FEED_FORWARD,
    INNER,
    WIDTH,
    Entry,
    Example,
    FeedForward,
    Layer,
    SplitHeads,
    Stack,
    expects,
    hidden_states,
    token_ids,
)

__all__ = ["ENTRIES"]

_EXPERTS, _MEMORIES = 6, 13


class Parallel(nn.Module):
    """Attention and feed-forward from the same norm, as GPT-J has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = SplitHeads()
        self.feed_forward = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        """Add both to the residual stream."""
        normed = self.norm(x)
        return x + self.attention(normed) + self.feed_forward(normed)


class Joined(SplitHeads):
    """Attention and feed-forward by one output projection over both, concatenated (PaLM, Flux)."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Linear(WIDTH, FEED_FORWARD)
        self.joint = nn.Linear(INNER + FEED_FORWARD, WIDTH)
        self.output = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Project the concatenated results."""
        return self.joint(torch.cat((super().forward(x), self.expand(x).relu()), dim=-1))


class Shared(nn.Module):
    """One layer called three times, as ALBERT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(SplitHeads())

    def forward(self, x: Tensor) -> Tensor:
        """Three passes through the same weights."""
        for _ in range(3):
            x = self.layer(x)
        return x


class SpeltOut(SplitHeads):
    """Softmax of what a mask leaves, spelt out: exponentials over their sum, away from zero."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Divide the values' sum by that of the weights."""
        scores = self.scores(query, key)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        length = scores.shape[-1]
        weights = weights * torch.ones(length, length).tril()
        return weights @ value / (weights.sum(-1, keepdim=True) + 1e-6)


class Experts(nn.Module):
    """A dense mixture of experts: the softmax of the router is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, _EXPERTS)
        self.up = nn.Parameter(torch.randn(_EXPERTS, WIDTH, FEED_FORWARD) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(_EXPERTS, FEED_FORWARD, WIDTH) * FEED_FORWARD**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Every expert's answer, weighted by the router."""
        weights = self.router(x).softmax(-1)
        hidden = torch.einsum("bsm,emf->bsef", x, self.up).relu()
        answers = torch.einsum("bsef,efm->bsem", hidden, self.down)
        return torch.einsum("bse,bsem->bsm", weights, answers)


class Pooled(nn.Module):
    """A layer, then pooling by a learned query vector: a softmax over positions without heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(SplitHeads()), Layer(SplitHeads()))
        self.query = nn.Parameter(torch.randn(WIDTH))
        self.classifier = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the pooled sequence."""
        x = self.layers(x)
        weights = (x @ self.query).softmax(-1)
        return self.classifier((weights.unsqueeze(1) @ x).squeeze(1))


class Memory(nn.Module):
    """A lookup in learned keys and values: softmax between two matrix products, but no heads."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(_MEMORIES, WIDTH))
        self.values = nn.Parameter(torch.randn(_MEMORIES, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """The memories that answer to x."""
        return (x @ self.keys.T).softmax(-1) @ self.values


class SqueezeExcite(nn.Module):
    """A convolution whose channels are weighted by a sigmoid of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, INNER, 3, padding=1)
        self.squeeze = nn.Linear(INNER, 8)
        self.excite = nn.Linear(8, INNER)

    def forward(self, x: Tensor) -> Tensor:
        """Channels, weighted."""
        x = self.conv(x).relu()
        weights = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return x * weights[:, :, None, None]


@expects(attentions=2, prunable=2)
def parallel() -> Example:
    """GPT-J's arrangement."""
    return Stack(Parallel, embed=True), (token_ids(),)


@expects(attentions=2, prunable=2)
def joined() -> Example:
    """One output projection over the context and the feed-forward's hidden states."""
    return Stack(lambda: Layer(Joined())), (hidden_states(),)


@expects(attentions=3, prunable=3)
def albert() -> Example:
    """Shared layers: three attentions that lose the same heads."""
    return Stack(Shared, layers=1), (hidden_states(),)


@expects(attentions=2, prunable=2)
def spelt_out() -> Example:
    """Softmax in five operators."""
    return Stack(lambda: Layer(SpeltOut())), (hidden_states(),)


@expects(attentions=2, prunable=2)
def experts() -> Example:
    """Transformer layers with a router."""
    return Stack(lambda: Layer(SplitHeads(), Experts())), (hidden_states(),)


@expects(attentions=2, prunable=2)
def pooled() -> Example:
    """Transformer layers with pooling at the end."""
    return Pooled(), (hidden_states(),)


@expects(attentions=0, prunable=0)
def memory() -> Example:
    """No attention: a learned memory."""
    return nn.Sequential(Memory(), Memory()), (hidden_states(),)


@expects(attentions=0, prunable=0)
def squeeze_excite() -> Example:
    """No attention: channel weights."""
    return SqueezeExcite(), (torch.randn(BATCH, WIDTH, 3, 6),)


@expects(attentions=0, prunable=0)
def class_scores() -> Example:
    """No attention: a softmax at the end of a classifier."""
    return nn.Sequential(FeedForward(), nn.Linear(WIDTH, 3), nn.Softmax(-1)), (hidden_states(),)


ENTRIES: tuple[Entry, ...] = (
    albert,
    class_scores,
    experts,
    joined,
    memory,
    parallel,
    pooled,
    spelt_out,
    squeeze_excite,
)
