"""Random transformers as plain data: what is drawn, and what is true of it by construction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hypothesis import strategies as st

__all__ = ["AttentionSpec", "LayerSpec", "Spec", "Truth", "specs"]


@dataclass(frozen=True)
class AttentionSpec:
    """One attention.  Every field that is a string names a spelling; see `attention.py`."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    projection: str
    order: str
    core: str
    spread: str
    bias: bool
    norm: str
    rotary: str
    causal: bool
    padding: bool
    alibi: bool
    table: str
    softcap: bool
    sinks: bool
    context_norm: str
    gate: str
    output: str
    coupling: str
    source: str
    """Who attends to what: "self", or to a "memory", or "latents" (learned queries) to the rest."""

    @property
    def separable(self) -> bool | None:
        """Whether heads can be removed; None where it is open, because the layout is contrived."""
        if self.is_grouped and self.projection == "interleaved" and self.tiled:
            return None  # a query head lies beside one KV head, and attends to another
        if self.is_grouped and self.output == "picked":
            return None  # picked from the product of groups and their heads
        if self.coupling == "flat_query_norm" and self.core == "in_pieces" and self.head_dim == 1:
            return None  # a piece of one channel is picked from what is normalised
        if self.coupling in READ_ELSEWHERE and self.projection in ONE_WEIGHT:
            return None  # queries, keys and values are cut together
        return self.heads > 1 and self.coupling in ("none", *READ_ELSEWHERE)

    def runs(self, role: str) -> tuple[int, int]:
        """How many rows of a weight are a head's, and a KV group's, if they lie side by side."""
        rows = self.value_dim if role == "v" else self.head_dim
        return rows, rows * (self.heads // self.kv_heads if role == "q" else 1)

    @property
    def is_grouped(self) -> bool:
        """Whether there are several KV groups of several heads."""
        return 1 < self.kv_heads < self.heads

    @property
    def tiled(self) -> bool:
        """Whether query head n attends to KV head n mod kv_heads."""
        return self.spread == "tile" and self.core not in ("grouped", "sdpa_gqa")


@dataclass(frozen=True)
class LayerSpec:
    """One layer: attentions, what follows them, and how they are joined to the residual stream."""

    attention: AttentionSpec
    cross: AttentionSpec | None
    ffn: str
    form: str
    norm: str
    distractor: str


@dataclass(frozen=True)
class Spec:
    """A model.  `calls` says in which order its layers are called; one may be called twice."""

    width: int
    layers: tuple[LayerSpec, ...]
    calls: tuple[int, ...]
    pool: AttentionSpec | None
    tied: str
    """Which projection's weight the last layer takes from the first: "q", "k", "v", or "none"."""
    dynamic: bool
    batch: int
    length: int
    memory: int
    seed: int

    def attentions(self) -> Iterator[tuple[str, AttentionSpec]]:
        """Every attention that runs, in order, by the path of its module."""
        for call in self.calls:
            yield f"layers.{call}.attention", self.layers[call].attention
            cross = self.layers[call].cross
            if cross is not None:
                yield f"layers.{call}.cross", cross
        if self.pool is not None:
            yield "pool", self.pool

    def truth(self) -> list[Truth]:
        """What `find_attention` must return."""
        seen: dict[str, int] = {}
        out = []
        for path, spec in self.attentions():
            seen[path] = seen.get(path, 0) + 1
            call = f"@{seen[path]}" if seen[path] > 1 else ""
            separable = spec.separable
            if self.tied != "none":
                separable = (separable and self.fits()) or None
            out.append(Truth(path, call, spec, separable))
        return out

    def fits(self) -> bool:
        """Whether layers with one weight have heads of one size, and groups that do not overlap."""
        if self.tied == "none":
            return True
        one, other = (self.layers[n].attention for n in (0, -1))
        if self.tied == "q" and one.is_grouped and other.is_grouped and one.tiled != other.tiled:
            return False
        (head, group), (other_head, other_group) = one.runs(self.tied), other.runs(self.tied)
        return head == other_head and max(group, other_group) % min(group, other_group) == 0


@dataclass(frozen=True)
class Truth:
    """One attention that is there."""

    path: str
    call: str
    spec: AttentionSpec
    separable: bool | None
    """As its own layers have it; None where it is open, as in layers that do not fit each other."""


SELF_PROJECTIONS = [
    "separate", "matmul", "fused", "sliced", "interleaved", "stacked", "packed", "einsum", "conv",
    "addmm", "latent", "module", "apart",
    "on_top",
]  # fmt: skip
CROSS_PROJECTIONS = [
    "separate", "matmul", "fused_weight", "packed", "einsum", "conv", "module", "apart",
    "on_top",
]  # fmt: skip
PROJECTIONS = {True: SELF_PROJECTIONS, False: CROSS_PROJECTIONS}
CORES = [
    "sdpa", "eager", "merged", "baddbmm", "einsum", "grouped", "sdpa_gqa", "in_pieces", "spelt",
]  # fmt: skip
NEED_SCORES = {"talking_before", "talking_after", "probabilities", "max_of_scores"}
DISTRACTORS = [
    "router", "top_experts", "pooling", "squeeze", "softmax_gate", "linear_attention", "similarity",
    "memory_lookup", "class_scores",
]  # fmt: skip
GATES = ["elementwise", "per_head", "routed", "parameter", "common"]
OUTPUTS = [
    "linear", "matmul", "addmm", "einsum", "conv", "beside", "beside_heads", "twice", "picked",
]  # fmt: skip
COUPLINGS = [
    "layer_norm", "rms_norm", "talking_before", "talking_after", "probabilities", "max_of_scores",
    "cumsum", "sort", "mean", "sum", "roll", "flat_query_norm", "returned",
]  # fmt: skip
ONE_WEIGHT = ["stacked", "interleaved"]
READ_ELSEWHERE = ["layer_over_values", "cached"]


def one_of(*values: object) -> st.SearchStrategy:
    return st.sampled_from(values)


@st.composite
def attention_specs(draw, source: str) -> AttentionSpec:
    kv_heads, group = draw(st.integers(1, 4)), draw(one_of(1, 1, 2, 3))
    head_dim = draw(one_of(2, 4, 1, 3, 6))
    even = head_dim % 2 == 0
    spec = AttentionSpec(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=draw(one_of(head_dim, head_dim, 3, 2)),
        projection=draw(st.sampled_from(PROJECTIONS[source == "self"])),
        order="".join(draw(st.permutations("qkv"))),
        core=draw(st.sampled_from(CORES)),
        spread=draw(one_of("interleave", "expand", "tile")),
        bias=draw(st.booleans()),
        norm=draw(one_of(*["none"] * 6, "rms", "layer", "per_head", "cosine")),
        rotary=draw(one_of(*["none"] * 5, "half", "pairs", "partial")) if even else "none",
        causal=draw(one_of(False, False, True)) and source == "self",
        padding=draw(one_of(False, False, True)) and source == "self",
        alibi=draw(one_of(*[False] * 7, True)),
        table=draw(one_of(*["none"] * 7, "embedding", "indexed", "shared", "shared")),
        softcap=draw(one_of(*[False] * 7, True)),
        sinks=draw(one_of(*[False] * 7, True)),
        context_norm=draw(one_of(*["none"] * 8, "group", "per_head")),
        gate=draw(st.sampled_from(["none"] * 7 + GATES)),
        output=draw(st.sampled_from(OUTPUTS)),
        coupling=draw(st.sampled_from(draw(one_of(["none"], ["none"], COUPLINGS, READ_ELSEWHERE)))),
        source=source,
    )
    return consistent(spec)


def consistent(spec: AttentionSpec) -> AttentionSpec:
    """The nearest specification that can be built."""
    if spec.projection in ("apart", "on_top") and spec.head_dim == 1:
        spec = replace(spec, projection="separate")  # a layer of one row has no axis
    if spec.projection in ("stacked", "latent", "module") or spec.core == "in_pieces":
        spec = replace(spec, kv_heads=spec.heads)
    if spec.projection in ("stacked", "interleaved", "module"):
        spec = replace(spec, value_dim=spec.head_dim)
    if spec.projection == "latent":
        spec = replace(spec, rotary="none")
    if spec.heads == spec.kv_heads and spec.core in ("grouped", "sdpa_gqa"):
        spec = replace(spec, core="eager")
    if spec.coupling in NEED_SCORES or spec.sinks or spec.softcap:
        spec = replace(
            spec, core={"sdpa_gqa": "grouped", "sdpa": "eager"}.get(spec.core, spec.core)
        )
    if spec.projection == "module":  # nn.MultiheadAttention does all of it by itself
        spec = replace(
            spec, norm="none", rotary="none", causal=False, padding=False, alibi=False,
            table="none", softcap=False, sinks=False, context_norm="none", gate="none",
            output="linear", coupling="none", core="sdpa" if spec.core == "sdpa" else "merged",
        )  # fmt: skip
    if spec.table == "shared" and spec.source != "self":
        spec = replace(spec, table="embedding")
    if spec.heads == 1:
        spec = replace(spec, coupling="none")
    if spec.coupling in ("mean", "sum", "returned"):
        spec = replace(spec, output="linear", gate="none", context_norm="none")
    return spec


@st.composite
def layer_specs(draw) -> LayerSpec:
    return LayerSpec(
        attention=draw(attention_specs("self")),
        cross=draw(attention_specs("memory")) if draw(one_of(*[False] * 5, True)) else None,
        ffn=draw(one_of("none", "none", "none", "mlp", "gated")),
        form=draw(one_of("pre", "post", "parallel", "scaled", "plain")),
        norm=draw(one_of("layer", "none", "rms")),
        distractor=draw(st.sampled_from(["none"] * 10 + DISTRACTORS)),
    )


@st.composite
def with_rows(draw, layer: LayerSpec, role: str, rows: int) -> LayerSpec:
    """The layer with a weight of its own for `role`, of so many rows."""
    run = draw(st.sampled_from([n for n in range(1, rows + 1) if rows % n == 0 and rows <= 6 * n]))
    heads, group = rows // run, draw(st.integers(1, 3))
    if role == "q":
        kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    else:
        heads, kv_heads = heads * group, heads
    core = "eager" if layer.attention.core == "in_pieces" else layer.attention.core
    spec = replace(layer.attention, projection="separate", core=core)
    spec = replace(spec, heads=heads, kv_heads=kv_heads)
    spec = replace(spec, **{"value_dim" if role == "v" else "head_dim": run})
    if spec.coupling in READ_ELSEWHERE:
        spec = replace(spec, coupling="none")
    if spec.head_dim % 2:
        spec = replace(spec, rotary="none")
    return replace(layer, attention=consistent(spec))


@st.composite
def specs(draw) -> Spec:
    """A model of one or two layers, with sizes that may coincide where nothing is symbolic."""
    layers = [draw(layer_specs()) for _ in range(draw(one_of(1, 1, 1, 2)))]
    tied = draw(one_of(*["none"] * 18, "q", "k", "v"))
    if tied != "none":
        rows = draw(one_of(4, 6, 8, 12))
        layers = [draw(with_rows(draw(layer_specs()), tied, rows)) for _ in range(2)]
    first = layers[0].attention
    dynamic = len(layers) == 1 and draw(one_of(*[False] * 11, True))  # they take five times as long
    calls = list(range(len(layers)))
    if not dynamic and draw(one_of(*[False] * 7, True)):
        calls.append(draw(st.sampled_from(calls)))
    return Spec(
        width=draw(one_of(max(first.heads * first.value_dim, 2), 6, 8)),  # one has no axis
        layers=tuple(layers),
        calls=tuple(calls),
        pool=draw(attention_specs("latents")) if draw(one_of(*[False] * 9, True)) else None,
        tied=tied,
        dynamic=dynamic,
        batch=3 if dynamic else draw(st.integers(1, 4)),
        length=5 if dynamic else draw(st.integers(2, 6)),
        memory=7 if dynamic else draw(st.integers(2, 6)),
        seed=draw(st.integers(0, 3)),
    )
