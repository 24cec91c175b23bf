"""One attention in plain torch, spelled as its specification says."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.properties.projections import PROJECTIONS
from tests.properties.specs import AttentionSpec

__all__ = ["Attention", "ModuleAttention", "RelativeBias", "build_attention", "rms"]

BUCKETS = 7


def rms(x: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + 1e-3)


def distances(queries: Tensor, keys: Tensor) -> Tensor:
    """How far each key lies behind each query."""
    return torch.arange(queries.shape[1])[:, None] - torch.arange(keys.shape[1])[None, :]


class RelativeBias(nn.Module):
    """A number for each head and each (clipped) distance: T5's table, or one looked up by index."""

    def __init__(self, heads: int, *, indexed: bool) -> None:
        super().__init__()
        self.indexed = indexed
        shape = (heads, BUCKETS) if indexed else (BUCKETS, heads)
        self.table = nn.Parameter(torch.randn(shape))

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        bucket = distances(queries, keys).clamp(-3, 3) + 3
        if self.indexed:
            return self.table[:, bucket]
        return F.embedding(bucket, self.table).permute(2, 0, 1).unsqueeze(0)


def rotate(x: Tensor, frequencies: Tensor, how: str) -> Tensor:
    """Rotary position embedding of (batch, heads, length, d)."""
    d = 2 * frequencies.shape[0]
    rest = x[..., d:]
    x = x[..., :d]
    angle = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), frequencies)
    if how == "pairs":
        cos, sin = angle.cos(), angle.sin()
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    turned = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], dim=-1)
    x = x * cos + turned * sin
    return torch.cat([x, rest], dim=-1) if how == "partial" else x


class Attention(nn.Module):
    """Projections, core, output projection.  `mask` (heads,) switches heads off: the reference."""

    def __init__(self, spec: AttentionSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.mask: Tensor | None = None
        self.project = PROJECTIONS[spec.projection](spec, width)
        heads, d = spec.heads, spec.head_dim + 2 * (spec.projection == "latent")
        self.scale = d**-0.5
        if spec.norm == "layer":
            self.q_norm, self.k_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        elif spec.norm in ("rms", "per_head"):
            own = spec.norm == "per_head"
            self.q_weight = nn.Parameter(torch.randn((heads, 1, d) if own else (d,)))
            self.k_weight = nn.Parameter(torch.randn((spec.kv_heads, 1, d) if own else (d,)))
        elif spec.norm == "cosine":
            self.temperature = nn.Parameter(torch.rand(heads, 1, 1))
        if spec.rotary != "none":
            turned = d // 2 if spec.rotary == "partial" and d % 4 == 0 else d
            self.register_buffer("frequencies", torch.rand(turned // 2))
        if spec.table in ("embedding", "indexed"):
            self.table = RelativeBias(heads, indexed=spec.table == "indexed")
        if spec.sinks:
            self.sinks = nn.Parameter(torch.randn(heads))
        self._build_end(spec, width)

    def _build_end(self, spec: AttentionSpec, width: int) -> None:
        heads, d = spec.heads, spec.value_dim
        inner = heads * d
        if spec.context_norm == "group":
            self.group_norm = nn.GroupNorm(heads, inner)
        elif spec.context_norm == "per_head":
            self.head_norm = nn.LayerNorm(d)
        gates = {"elementwise": inner, "per_head": heads, "routed": heads, "common": 1}
        if spec.gate in gates:
            self.gate = nn.Linear(width, gates[spec.gate])
        elif spec.gate == "parameter":
            self.gate = nn.Parameter(torch.randn(heads, 1, 1))
        if spec.coupling.startswith("talking"):
            self.talk = nn.Linear(heads, heads, bias=False)
        elif spec.coupling == "layer_norm":
            self.norm = nn.LayerNorm(inner)
        elif spec.coupling == "flat_query_norm":
            self.norm = nn.LayerNorm(heads * (spec.head_dim + 2 * (spec.projection == "latent")))
        elif spec.coupling == "layer_over_values":
            self.over_values = nn.Linear(spec.kv_heads * d, 3)
        if spec.coupling in ("mean", "sum"):
            inner = d
        if spec.output in ("matmul", "addmm", "einsum"):
            shape = {"matmul": (width, inner), "addmm": (inner, width), "einsum": (heads, d, width)}
            self.out = nn.Parameter(torch.randn(shape[spec.output]))
            self.out_bias = nn.Parameter(torch.randn(width))
        elif spec.output == "conv":
            self.out = nn.Conv1d(inner, width, 1, bias=spec.bias)
        else:
            beside = {"beside": 3, "beside_heads": 2 * d}.get(spec.output, 0)
            self.out = nn.Linear(inner + beside, width, bias=spec.bias)
        if spec.output in ("beside", "beside_heads"):
            self.other = nn.Linear(width, 3 if spec.output == "beside" else 2 * d)
        if spec.output == "twice":
            self.second = nn.Linear(inner, width, bias=spec.bias)

    def forward(
        self, x: Tensor, memory: Tensor, padding: Tensor | None, shared: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What is added to the residual stream, and what is returned beside it."""
        spec = self.spec
        q, k, v = self.project(x, memory)
        q, k = self._normed(q, k)
        beside = self._beside(k, v)
        if spec.rotary != "none":
            q = rotate(q, self.frequencies, spec.rotary)
            k = rotate(k, self.frequencies, spec.rotary)
        if spec.core not in ("grouped", "sdpa_gqa"):
            k, v = self._spread(k), self._spread(v)
        context, extra = self._core(q, k, v, self._bias(x, memory, padding, shared))
        context = self._gated(self._coupled(self._context_normed(context), x), x)
        if spec.coupling == "returned":
            extra = context
        if self.mask is not None:
            context = context * self.mask[:, None, None]
        return self._output(context, x), beside if extra is None else extra

    # -------------------------------------------------------------------------------- before it

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.spec.coupling == "flat_query_norm":
            flat = q.transpose(1, 2).flatten(2)
            q = self.norm(flat).view(*flat.shape[:2], q.shape[1], q.shape[3]).transpose(1, 2)
        match self.spec.norm:
            case "layer":
                return self.q_norm(q), self.k_norm(k)
            case "rms" | "per_head":
                return rms(q) * self.q_weight, rms(k) * self.k_weight
            case "cosine":
                return F.normalize(q, dim=-1) * self.temperature.exp(), F.normalize(k, dim=-1)
        return q, k

    def _beside(self, k: Tensor, v: Tensor) -> Tensor | None:
        """What is made of keys and values beside the attention."""
        if self.spec.coupling == "layer_over_values":
            return self.over_values(v.transpose(1, 2).flatten(2)).sigmoid()
        return k if self.spec.coupling == "cached" else None

    def _spread(self, x: Tensor) -> Tensor:
        """Each KV head for all of its query heads."""
        b, kv, s, d = x.shape
        times = self.spec.heads // kv
        if times == 1:
            return x
        match self.spec.spread:
            case "interleave":
                return x.repeat_interleave(times, dim=1)
            case "tile":
                return x.repeat(1, times, 1, 1)
        return x[:, :, None].expand(b, kv, times, s, d).reshape(b, kv * times, s, d)

    def _bias(
        self, x: Tensor, memory: Tensor, padding: Tensor | None, shared: Tensor | None
    ) -> Tensor | None:
        """What is added to the scores (batch, heads, queries, keys), or broadcasts to it."""
        spec, parts = self.spec, []
        if spec.causal:
            later = torch.ones(x.shape[1], memory.shape[1], dtype=torch.bool).triu(1)
            parts.append(torch.zeros(later.shape, dtype=x.dtype).masked_fill(later, -1e4))
        if spec.padding:
            parts.append(
                torch.where(padding, x.new_zeros(()), x.new_tensor(-1e4))[:, None, None, :]
            )
        if spec.alibi:
            slopes = torch.pow(2.0, -torch.arange(1, 1 + spec.heads, dtype=x.dtype))
            parts.append(-slopes[:, None, None] * distances(x, memory).abs())
        if spec.table == "shared":
            parts.append(shared)
        elif spec.table != "none":
            parts.append(self.table(x, memory))
        return sum(parts[1:], parts[0]) if parts else None

    # ----------------------------------------------------------------------------------- the core

    def _core(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        match self.spec.core:
            case "sdpa":
                scale = self.scale if self.spec.bias else None
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale), None
            case "sdpa_gqa":
                return F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True), None
            case "grouped":
                q = q.unflatten(1, (k.shape[1], -1))
                scores = (q @ k.unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * self.scale
                p, extra = self._probabilities(scores, bias)
                return (p.unflatten(1, (k.shape[1], -1)) @ v.unsqueeze(2)).flatten(1, 2), extra
            case "einsum":
                scores = torch.einsum("bhqd,bhkd->bhqk", q * self.scale, k)
                p, extra = self._probabilities(scores, bias)
                return torch.einsum("bhqk,bhkd->bhqd", p, v), extra
            case "eager" | "spelt":
                p, extra = self._probabilities(q @ k.transpose(2, 3) / (1 / self.scale), bias)
                return p @ v, extra
            case "in_pieces":
                return self._in_pieces(q, k, v, bias)
        return self._merged(q, k, v, bias)

    def _merged(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Batch and heads in one dimension: bmm and baddbmm."""
        b, h, s, m = *q.shape[:3], k.shape[2]
        q, k, v = (x.reshape(b * h, x.shape[2], x.shape[3]) for x in (q, k, v))
        if self.spec.core == "baddbmm":
            start = torch.zeros(1, dtype=q.dtype) if bias is None else bias
            start = start.expand(b, h, s, m).reshape(b * h, s, m)
            scores = torch.baddbmm(start, q, k.transpose(1, 2), alpha=self.scale)
            p, extra = self._probabilities(scores.view(b, h, s, m), None)
        else:
            scores = torch.bmm(q, k.transpose(1, 2)) * self.scale
            p, extra = self._probabilities(scores.view(b, h, s, m), bias)
        return torch.bmm(p.reshape(b * h, s, m), v).view(b, h, s, v.shape[2]), extra

    def _in_pieces(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The width cut into heads, which lie side by side along the batch."""
        b, h, s, m = *q.shape[:3], k.shape[2]
        q, k, v = (torch.cat(x.transpose(1, 2).flatten(2).split(x.shape[3], 2)) for x in (q, k, v))
        scores = (q @ k.transpose(1, 2) * self.scale).view(h, b, s, m).transpose(0, 1)
        p, extra = self._probabilities(scores, bias)
        context = p.transpose(0, 1).reshape(h * b, s, m) @ v
        together = torch.cat(context.split(b) if self.spec.bias else context.chunk(h), dim=2)
        return together.unflatten(2, (h, -1)).transpose(1, 2), extra

    def _probabilities(self, scores: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        spec = self.spec
        if spec.softcap:
            scores = 5 * torch.tanh(scores / 5)
        if spec.coupling == "talking_before":
            scores = self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if spec.coupling == "max_of_scores":
            scores = scores - scores.amax(1, keepdim=True)
        if bias is not None:
            scores = scores + bias
        if spec.sinks:
            sinks = self.sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
            p = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
        elif spec.core == "spelt":
            p = (scores - scores.amax(-1, keepdim=True)).exp()
            p = p / (p.sum(-1, keepdim=True) + 1e-9)
        else:
            p = scores.softmax(-1)
        if spec.coupling == "talking_after":
            p = torch.einsum("bhqk,gh->bgqk", p, self.talk.weight)
        return p, p if spec.coupling == "probabilities" else None

    # ---------------------------------------------------------------------------------- after it

    def _context_normed(self, context: Tensor) -> Tensor:
        if self.spec.context_norm == "per_head":
            return self.head_norm(context)
        if self.spec.context_norm == "group":
            b, h, s, d = context.shape
            flat = context.transpose(1, 2).reshape(b * s, h * d)
            return self.group_norm(flat).view(b, s, h, d).transpose(1, 2)
        return context

    def _coupled(self, context: Tensor, x: Tensor) -> Tensor:
        """Make the heads depend on each other."""
        match self.spec.coupling:
            case "layer_norm":
                flat = self.norm(context.transpose(1, 2).flatten(2))
                return flat.unflatten(2, (context.shape[1], -1)).transpose(1, 2)
            case "rms_norm":
                return rms(context, (1, 3))
            case "cumsum":
                return context.cumsum(1)
            case "sort":
                return context.sort(1).values
            case "mean":
                return context.mean(1, keepdim=True)
            case "sum":
                return context.sum(1, keepdim=True)
            case "roll":
                return context + context.roll(1, dims=1)
        return context

    def _gated(self, context: Tensor, x: Tensor) -> Tensor:
        match self.spec.gate:
            case "elementwise":
                gate = self.gate(x).sigmoid()
                return context * gate.unflatten(2, (context.shape[1], -1)).transpose(1, 2)
            case "per_head":
                return context * self.gate(x).sigmoid().transpose(1, 2).unsqueeze(-1)
            case "routed":  # depends on all heads, but none of it on a head's context
                return context * self.gate(x).softmax(-1).transpose(1, 2).unsqueeze(-1)
            case "common":
                return context * F.softplus(self.gate(x)).unsqueeze(1)
            case "parameter":
                return context * self.gate
        return context

    def _output(self, context: Tensor, x: Tensor) -> Tensor:
        b, h, s, d = context.shape
        merged = context.transpose(1, 2).reshape(b, s, h * d)
        match self.spec.output:
            case "matmul":
                return merged @ self.out.T + self.out_bias
            case "addmm":
                flat = torch.addmm(self.out_bias, merged.reshape(b * s, h * d), self.out)
                return flat.view(b, s, -1)
            case "einsum":
                return torch.einsum("bhsd,hdw->bsw", context, self.out) + self.out_bias
            case "conv":
                return self.out(context.transpose(2, 3).reshape(b, h * d, s)).transpose(1, 2)
            case "beside":
                return self.out(torch.cat([merged, self.other(x)], dim=-1))
            case "beside_heads":
                other = self.other(x).view(b, s, 2, d)
                return self.out(torch.cat([other, context.transpose(1, 2)], dim=2).flatten(2))
            case "picked":
                heads = context.unbind(1) if self.spec.bias else [context[:, n] for n in range(h)]
                return self.out(torch.cat(heads, -1))
            case "twice":
                return self.out(merged) * torch.tanh(self.second(merged))
        return self.out(merged)


class ModuleAttention(nn.Module):
    """`nn.MultiheadAttention`; switching heads off zeroes what its output projection reads."""

    def __init__(self, spec: AttentionSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.inner = nn.MultiheadAttention(
            spec.heads * spec.head_dim, spec.heads, bias=spec.bias, batch_first=spec.order < "q"
        )
        self.enter = nn.Linear(width, spec.heads * spec.head_dim)
        self.leave = nn.Linear(spec.heads * spec.head_dim, width)

    @property
    def mask(self) -> None:
        return None

    @mask.setter
    def mask(self, value: Tensor) -> None:
        self.inner.out_proj.weight.data *= value.repeat_interleave(self.spec.head_dim)

    def forward(
        self, x: Tensor, memory: Tensor, padding: Tensor | None, shared: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x, memory = self.enter(x), self.enter(memory)
        if not self.inner.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        y, _ = self.inner(x, memory, memory, need_weights=self.spec.core == "merged")
        return self.leave(y if self.inner.batch_first else y.transpose(0, 1)), None


def build_attention(spec: AttentionSpec, width: int) -> Attention | ModuleAttention:
    made = ModuleAttention if spec.projection == "module" else Attention
    return made(spec, width)
