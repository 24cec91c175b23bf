"""From an activation to queries, keys and values: each class is one layout of the weights.

All return queries (batch, heads, length, head_dim), keys (batch, kv_heads, length, head_dim) and
values (batch, kv_heads, length, value_dim).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.properties.specs import AttentionSpec

__all__ = ["PROJECTIONS"]

QKV = tuple[Tensor, Tensor, Tensor]


def widths(spec: AttentionSpec) -> dict[str, int]:
    return {
        "q": spec.heads * spec.head_dim,
        "k": spec.kv_heads * spec.head_dim,
        "v": spec.kv_heads * spec.value_dim,
    }


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, length, heads * d) to (batch, heads, length, d)."""
    return x.view(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


class Projection(nn.Module):
    def __init__(self, spec: AttentionSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.count = {"q": spec.heads, "k": spec.kv_heads, "v": spec.kv_heads}
        self.build(spec, width)

    def all_heads(self, q: Tensor, k: Tensor, v: Tensor) -> QKV:
        return (
            split_heads(q, self.count["q"]),
            split_heads(k, self.count["k"]),
            split_heads(v, self.count["v"]),
        )

    def in_order(self, pieces: tuple[Tensor, ...]) -> QKV:
        """Pieces that lie in the order of the specification, as q, k, v."""
        named = dict(zip(self.spec.order, pieces, strict=True))
        return named["q"], named["k"], named["v"]


class Separate(Projection):
    def build(self, spec: AttentionSpec, width: int) -> None:
        for name, n in widths(spec).items():
            setattr(self, name, nn.Linear(width, n, bias=spec.bias))

    def forward(self, x: Tensor, memory: Tensor) -> QKV:
        return self.all_heads(self.q(x), self.k(memory), self.v(memory))


class Apart(Projection):
    """A layer for every head; queries that share KV heads come from one."""

    def build(self, spec: AttentionSpec, width: int) -> None:
        for name, n in widths(spec).items():
            layers = 1 if name == "q" and 1 < spec.kv_heads < spec.heads else self.count[name]
            own = (nn.Linear(width, n // layers, bias=spec.bias) for _ in range(layers))
            setattr(self, name, nn.ModuleList(own))

    def forward(self, x: Tensor, memory: Tensor) -> QKV:
        sources = {"q": x, "k": memory, "v": memory}
        joined = (
            torch.cat([layer(source) for layer in getattr(self, name)], dim=-1)
            for name, source in sources.items()
        )
        return self.all_heads(*joined)


class OnTop(Projection):
    """A layer for every KV head, and for the queries that share it, stacked."""

    def build(self, spec: AttentionSpec, width: int) -> None:
        for name, n in widths(spec).items():
            own = (nn.Linear(width, n // spec.kv_heads) for _ in range(spec.kv_heads))
            setattr(self, name, nn.ModuleList(own))

    def forward(self, x: Tensor, memory: Tensor) -> QKV:
        return self.on_top(self.q, x), self.on_top(self.k, memory), self.on_top(self.v, memory)

    def on_top(self, layers: nn.ModuleList, source: Tensor) -> Tensor:
        group = self.spec.heads // self.spec.kv_heads if layers is self.q else 1
        if group == 1:
            return torch.stack([layer(source) for layer in layers], dim=1)
        groups = [layer(source).unflatten(2, (group, -1)) for layer in layers]
        queries = torch.stack(groups, dim=3 if self.spec.tiled else 2)
        return queries.flatten(2, 3).transpose(1, 2)


class Matmul(Projection):
    """Weights as parameters: (out, in), transposed where they are used."""

    def build(self, spec: AttentionSpec, width: int) -> None:
        for name, n in widths(spec).items():
            setattr(self, name, nn.Parameter(torch.randn(n, width)))

    def forward(self, x: Tensor, memory: Tensor) -> QKV:
        return self.all_heads(x @ self.q.T, memory @ self.k.T, memory @ self.v.T)


class Fused(Projection):
    """One linear layer; its result is split in the order of the specification."""

    def build(self, spec: AttentionSpec, width: int) -> None:
        self.sizes = [widths(spec)[name] for name in spec.order]
        self.qkv = nn.Linear(width, sum(self.sizes), bias=spec.bias)

    def forward(self, x: Tensor, memory: Tensor) -> QKV:
        pieces = self.qkv(x)
        if len(set(self.sizes)) == 1 and self.spec.bias:
            return self.all_heads(*self.in_order(pieces.chunk(3, dim=-1)))
        return self.all_heads(*self.in_order(pieces.split(self.sizes, dim=-1)))


class Sliced(Fused):
    """As `Fused`, cut by slices."""

    def forward(self, x: Tensor, memory: Tensor) -> QKV:
        y = self.qkv(x)
        a, b = self.sizes[0], self.sizes[0] + self.sizes[1]
        return self.all_heads(*self.in_order((y[..., :a], y[..., a:b], y[..., b:])))


class FusedWeight(Fused):
    """One weight, cut before it is used: `nn.MultiheadAttention`'s way for cross-attention."""

    def forward(self, x: Tensor, memory: Tensor) -> QKV:
        q, k, v = self.in_order(self.qkv.weight.split(self.sizes))
        b = self.in_order(self.qkv.bias.split(self.sizes)) if self.spec.bias else (None,) * 3
        projected = F.linear(x, q, b[0]), F.linear(memory, k, b[1]), F.linear(memory, v, b[2])
        return self.all_heads(*projected)


class Interleaved(Projection):
    """One linear layer; each KV head lies together with the query heads that share it."""

    def build(self, spec: AttentionSpec, width: int) -> None:
        self.group = spec.heads // spec.kv_heads
        self.rows = self.group + 2
        self.qkv = nn.Linear(width, spec.kv_heads * self.rows * spec.head_dim, bias=spec.bias)

    def forward(self, x: Tensor, memory: Tensor) -> QKV:
        spec = self.spec
        both = self.qkv(x).unflatten(-1, (spec.kv_heads, self.rows * spec.head_dim))
        rows = [self.group if name == "q" else 1 for name in spec.order]
        pieces = both.split([n * spec.head_dim for n in rows], dim=-1)
        q, k, v = self.in_order(pieces)
        q = q.reshape(*q.shape[:2], spec.heads, spec.head_dim)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class Stacked(Projection):
    """One linear layer, read as (3, heads, head_dim); or as (heads, 3, head_dim)."""

    def build(self, spec: AttentionSpec, width: int) -> None:
        self.qkv = nn.Linear(width, 3 * spec.heads * spec.head_dim, bias=spec.bias)

    def forward(self, x: Tensor, memory: Tensor) -> QKV:
        b, s, _ = x.shape
        if self.spec.order < "q":
            all_three = self.qkv(x).view(b, s, self.spec.heads, 3, self.spec.head_dim)
            pieces = tuple(all_three.select(3, i).transpose(1, 2) for i in range(3))
        else:
            all_three = self.qkv(x).reshape(b, s, 3, self.spec.heads, self.spec.head_dim)
            pieces = all_three.permute(2, 0, 3, 1, 4).unbind(0)
        return self.in_order(pieces)


class Packed(Projection):
    """Queries by themselves, keys and values fused."""

    def build(self, spec: AttentionSpec, width: int) -> None:
        self.sizes = [widths(spec)["k"], widths(spec)["v"]]
        self.q = nn.Linear(width, widths(spec)["q"], bias=spec.bias)
        self.kv = nn.Linear(width, sum(self.sizes), bias=spec.bias)

    def forward(self, x: Tensor, memory: Tensor) -> QKV:
        return self.all_heads(self.q(x), *self.kv(memory).split(self.sizes, dim=-1))


class Einsum(Projection):
    """Weights with a head dimension of their own."""

    def build(self, spec: AttentionSpec, width: int) -> None:
        for name, n in widths(spec).items():
            heads = self.count[name]
            setattr(self, name, nn.Parameter(torch.randn(width, heads, n // heads)))
            if spec.bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(heads, 1, n // heads)))

    def one(self, x: Tensor, name: str) -> Tensor:
        y = torch.einsum("bsw,whd->bhsd", x, getattr(self, name))
        return y + getattr(self, f"{name}_bias") if self.spec.bias else y

    def forward(self, x: Tensor, memory: Tensor) -> QKV:
        return self.one(x, "q"), self.one(memory, "k"), self.one(memory, "v")


class Conv(Projection):
    """Convolutions of one position over (batch, channels, length)."""

    def build(self, spec: AttentionSpec, width: int) -> None:
        for name, n in widths(spec).items():
            setattr(self, name, nn.Conv1d(width, n, 1, bias=spec.bias))

    def one(self, x: Tensor, name: str) -> Tensor:
        y = getattr(self, name)(x.transpose(1, 2))
        heads = self.count[name]
        return y.view(y.shape[0], heads, y.shape[1] // heads, y.shape[2]).permute(0, 1, 3, 2)

    def forward(self, x: Tensor, memory: Tensor) -> QKV:
        return self.one(x, "q"), self.one(memory, "k"), self.one(memory, "v")


class Addmm(Projection):
    """GPT-2's: a weight (in, out), applied to all positions of the batch at once."""

    def build(self, spec: AttentionSpec, width: int) -> None:
        self.sizes = [widths(spec)[name] for name in spec.order]
        self.weight = nn.Parameter(torch.randn(width, sum(self.sizes)))
        self.bias = nn.Parameter(torch.randn(sum(self.sizes)))

    def forward(self, x: Tensor, memory: Tensor) -> QKV:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        pieces = flat.view(*x.shape[:2], flat.shape[-1]).split(self.sizes, dim=2)
        return self.all_heads(*self.in_order(pieces))


class Latent(Projection):
    """Keys and values of low rank, and a part of the key that all heads share."""

    def build(self, spec: AttentionSpec, width: int) -> None:
        self.sizes = [spec.head_dim, spec.value_dim]
        self.q = nn.Linear(width, spec.heads * (spec.head_dim + 2), bias=spec.bias)
        self.down = nn.Linear(width, 3 + 2, bias=spec.bias)
        self.norm = nn.LayerNorm(3)
        self.up = nn.Linear(3, spec.heads * sum(self.sizes), bias=spec.bias)

    def forward(self, x: Tensor, memory: Tensor) -> QKV:
        heads = self.spec.heads
        low, shared = self.down(memory).split([3, 2], dim=-1)
        k, v = split_heads(self.up(self.norm(low)), heads).split(self.sizes, dim=-1)
        shared = shared.unsqueeze(1).expand(-1, heads, -1, -1)
        return split_heads(self.q(x), heads), torch.cat([k, shared], dim=-1), v


PROJECTIONS = {
    "addmm": Addmm,
    "apart": Apart,
    "conv": Conv,
    "einsum": Einsum,
    "fused": Fused,
    "fused_weight": FusedWeight,
    "interleaved": Interleaved,
    "latent": Latent,
    "matmul": Matmul,
    "on_top": OnTop,
    "packed": Packed,
    "separate": Separate,
    "sliced": Sliced,
    "stacked": Stacked,
}
