"""A small transformer from a specification, with what looks like attention and is not."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.properties.attention import Attention, RelativeBias, build_attention, rms
from tests.properties.specs import LayerSpec, Spec

__all__ = ["Transformer", "build", "inputs_of"]

VOCABULARY = 11


class Rms(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms(x) * self.weight


NORMS = {"layer": nn.LayerNorm, "rms": Rms, "none": lambda width: nn.Identity()}


class FeedForward(nn.Module):
    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind != "none":
            self.up, self.down = nn.Linear(width, 10), nn.Linear(10, width)
        if kind == "gated":
            self.gate = nn.Linear(width, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "mlp":
                return self.down(F.gelu(self.up(x)))
            case "gated":
                return self.down(F.silu(self.gate(x)) * self.up(x))
        return torch.zeros_like(x)


class Distractor(nn.Module):
    """A softmax that is no attention, with a result that is added to the residual stream."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(width, 4), nn.Linear(width, 4 * width)
        self.c, self.d = nn.Linear(width, width), nn.Linear(width, width)
        self.memory = nn.Parameter(torch.randn(4, width))

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "router":  # a mixture of four experts
                experts = self.b(x).unflatten(-1, (4, -1))
                return torch.einsum("bse,bsew->bsw", self.a(x).softmax(-1), experts)
            case "top_experts":
                p, chosen = self.a(x).softmax(-1).topk(2, dim=-1)
                gates = torch.zeros_like(self.a(x)).scatter(-1, chosen, p)
                return (self.b(x).unflatten(-1, (4, -1)) * gates.unsqueeze(-1)).sum(2)
            case "pooling":  # four ways to sum the positions
                p = self.a(x).softmax(1).transpose(1, 2)
                return (p @ self.c(x)).mean(1, keepdim=True).expand_as(x)
            case "squeeze":
                return self.c(x) * self.d(x.mean(1, keepdim=True)).softmax(-1)
            case "softmax_gate":
                return self.c(x) * self.d(x).softmax(-1)
            case "linear_attention":  # no scores of queries with keys are ever normalised
                context = self.c(x).softmax(1).transpose(1, 2) @ self.d(x)
                return self.d(x).softmax(-1) @ context
            case "similarity":  # scores that nothing is summed with
                scores = (self.c(x) @ self.d(x).transpose(1, 2)).softmax(-1)
                return x * scores.diagonal(dim1=1, dim2=2).unsqueeze(-1)
            case "memory_lookup":
                return (self.c(x) @ self.memory.T).softmax(-1) @ self.memory
            case "class_scores":
                return F.pad(self.a(x).log_softmax(-1), (0, x.shape[-1] - 4))
        return torch.zeros_like(x)


class Layer(nn.Module):
    def __init__(self, spec: LayerSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.norm, self.ffn_norm = NORMS[spec.norm](width), NORMS[spec.norm](width)
        self.attention = build_attention(spec.attention, width)
        self.cross = build_attention(spec.cross, width) if spec.cross else None
        self.ffn = FeedForward(spec.ffn, width)
        self.scale = nn.Parameter(torch.randn(width)) if spec.form == "scaled" else None
        if spec.distractor != "none":
            self.distractor = Distractor(spec.distractor, width)

    def forward(
        self, x: Tensor, memory: Tensor | None, padding: Tensor | None, shared: Mapping[int, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        extras = []

        def attend(attention: Attention, x: Tensor, keys: Tensor) -> Tensor:
            y, extra = attention(x, keys, padding, shared.get(attention.spec.heads))
            extras.extend([] if extra is None else [extra])
            return y

        before = self.norm(x)
        match self.spec.form:
            case "pre":
                x = x + attend(self.attention, before, before)
                x = x + self.ffn(self.ffn_norm(x))
            case "scaled":
                x = x + self.scale * attend(self.attention, before, before)
                x = x + self.ffn(self.ffn_norm(x)) * self.scale
            case "parallel":
                x = x + attend(self.attention, before, before) + self.ffn(before)
            case "post":
                x = self.norm(attend(self.attention, x, x) + x)
                x = self.ffn_norm(self.ffn(x) + x)
            case "plain":
                x = self.ffn_norm(attend(self.attention, x, x))
                x = x + self.ffn(x)
        if self.cross is not None:
            x = x + attend(self.cross, self.norm(x), memory)
        if self.spec.distractor != "none":
            x = x + self.distractor(x)
        return x, extras


class Transformer(nn.Module):
    """Token ids (batch, length) and, where needed, a memory to attend to and a padding mask."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(VOCABULARY, spec.width)
        self.layers = nn.ModuleList(Layer(layer, spec.width) for layer in spec.layers)
        self.norm = nn.LayerNorm(spec.width)
        shared = sorted({a.heads for _, a in spec.attentions() if a.table == "shared"})
        self.shared = nn.ModuleDict({str(h): RelativeBias(h, indexed=False) for h in shared})
        if spec.pool is not None:
            self.latents = nn.Parameter(torch.randn(4, spec.width))
            self.pool = build_attention(spec.pool, spec.width)
        self._tie()

    def _tie(self) -> None:
        """Let the last layer project with a weight of the first one."""
        if self.spec.tied != "none":
            first, last = (self.layers[n].attention.project for n in (0, -1))
            getattr(last, self.spec.tied).weight = getattr(first, self.spec.tied).weight

    def forward(
        self, tokens: Tensor, memory: Tensor | None = None, padding: Tensor | None = None
    ) -> list[Tensor]:
        x, outputs = self.embedding(tokens), []
        shared = {int(heads): table(x, x) for heads, table in self.shared.items()}
        for call in self.spec.calls:
            x, extras = self.layers[call](x, memory, padding, shared)
            outputs += extras
        x = self.norm(x)
        if self.spec.pool is not None:
            latents = self.latents.expand(x.shape[0], -1, -1)
            pooled, extra = self.pool(latents, x, None, None)
            outputs += [pooled] if extra is None else [pooled, extra]
        return [x @ self.embedding.weight.T, *outputs]

    def without(self, kept: Mapping[str, Sequence[int]]) -> Transformer:
        """A copy in which the other heads' contexts are multiplied by zero.

        Args:
            kept: the heads that stay, by the path of the attention's module.
        """
        model = copy.deepcopy(self)
        for path, heads in kept.items():
            attention = model.get_submodule(path)
            mask = torch.zeros(attention.spec.heads, dtype=torch.float64)
            mask[list(heads)] = 1
            attention.mask = mask
        return model


def build(spec: Spec) -> Transformer:
    """The model of `spec`, in double precision, with weights that tell heads apart."""
    torch.manual_seed(spec.seed)
    model = Transformer(spec).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.6 * torch.randn_like(parameter))
    return model


def inputs_of(spec: Spec, batch: int, length: int, memory: int) -> dict[str, Any]:
    """Inputs of the given sizes; only those that the model needs."""
    torch.manual_seed(batch + 10 * length + 100 * memory)
    inputs = {"tokens": torch.randint(VOCABULARY, (batch, length))}
    if any(layer.cross is not None for layer in spec.layers):
        inputs["memory"] = torch.randn(batch, memory, spec.width, dtype=torch.float64)
    if any(attention.padding for _, attention in spec.attentions()):
        inputs["padding"] = torch.rand(batch, length) < 0.7
        inputs["padding"][:, 0] = True
    return inputs
