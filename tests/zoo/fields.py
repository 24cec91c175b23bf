"""How each size-like field of a transformers config shrinks, by the field's name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = [
    "BATCH",
    "HEADS",
    "KV_HEADS",
    "LAYERS",
    "SEQUENCE",
    "VOCAB",
    "WIDTH",
    "Defaults",
    "tiny_value",
]

BATCH, SEQUENCE = 2, 12
WIDTH, HEADS, KV_HEADS, FEED_FORWARD, LAYERS, VOCAB = 64, 4, 2, 128, 2, 128
HEAD_DIM, WIDE_HEAD_DIM = 16, 32

Rule = Callable[[Any], Any]


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fixed(value: Any) -> Rule:
    return lambda default: value


def _number(value: int) -> Rule:
    return lambda default: value if _is_number(default) else default


def _at_most(limit: int) -> Rule:
    def rule(default: Any) -> Any:
        if isinstance(default, (list, tuple)):
            return type(default)(min(item, limit) for item in default)
        return min(default, limit) if _is_number(default) else default

    return rule


def _each(value: int) -> Rule:
    """The value, once for every element where the field lists one per stage or axis."""

    def rule(default: Any) -> Any:
        if isinstance(default, (list, tuple)):
            return type(default)(value for _ in default)
        return value if _is_number(default) else default

    return rule


def _width(default: Any) -> Any:
    """The common width; 16, 32, 64, 128 over the stages of a pyramid."""
    if isinstance(default, (list, tuple)):
        return type(default)(16 * 2 ** min(stage, 3) for stage in range(len(default)))
    return WIDTH if _is_number(default) else default


def _heads(default: Any) -> Any:
    """The common head count, but one head stays one head; 1, 2, 4, 4 over a pyramid's stages."""
    if isinstance(default, (list, tuple)):
        return type(default)(min(2**stage, HEADS) for stage in range(len(default)))
    return HEADS if _is_number(default) and default != 1 else default


def _embedding_width(default: Any) -> Any:
    """Factorised embeddings stay narrower than the model."""
    return 32 if _is_number(default) and default < 512 else _number(WIDTH)(default)


def _window(default: Any) -> Any:
    """Image windows shrink with the image; other windows (vits, granite speech) stay."""
    return 2 if default in (7, 8, 14) else default


_ROWS: tuple[tuple[Rule, str], ...] = (
    (
        _width,
        """hidden_size d_model n_embd dim embed_dim hidden_dim out_hidden_size text_hidden_size
        hidden_sizes projector_hidden_size decoder_hidden_size encoder_hidden_size projection_dim
        encoder_hidden_dim image_text_hidden_size vision_output_dim projector_input_dim
        projector_output_dim mask_feature_size feature_size fpn_feature_size fpn_hidden_size
        memory_attention_hidden_size memory_encoder_hidden_size mask_downsampler_embed_dim
        memory_fuser_embed_dim codevector_dim proj_codevector_dim speaker_embedding_dim
        projection_hidden_dim patch_embed_hidden_size output_channels hidden_size_global
        entity_emb_size output_proj_dims mm_embed_dim audio_embed_dim auxiliary_channels
        d_latents audio_hidden_size output_dim""",
    ),
    (_embedding_width, "embedding_size"),
    (
        _heads,
        """num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads
        decoder_attention_heads decoder_num_attention_heads encoder_num_attention_heads
        resampler_n_heads swa_num_attention_heads decoder_self_attention_heads
        decoder_cross_attention_heads""",
    ),
    (
        _at_most(LAYERS),
        """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth layers
        encoder_num_hidden_layers decoder_num_hidden_layers memory_attention_num_layers
        resampler_depth num_mel_attn_blocks num_global_layers""",
    ),
    (
        _at_most(FEED_FORWARD),
        """intermediate_size ffn_dim d_ff d_inner mlp_dim encoder_ffn_dim decoder_ffn_dim
        moe_intermediate_size shared_expert_intermediate_size dense_intermediate_size
        decoder_intermediate_size shared_intermediate_size memory_fuser_intermediate_dim
        memory_attention_feed_forward_hidden_size intermediate_size_mlp""",
    ),
    (
        _at_most(VOCAB),
        """vocab_size entity_vocab_size unpadded_vocab_size vision_vocab_size mel_vocab_size
        max_position_embeddings n_positions n_ctx max_seq_len max_source_positions
        max_target_positions max_text_tokens max_pos_emb max_2d_position_embeddings
        original_max_position_embeddings""",
    ),
    (
        _at_most(4),
        """num_experts num_local_experts n_routed_experts num_frames
        num_conv_pos_embedding_groups""",
    ),
    (_at_most(2), "num_experts_per_tok"),
    (_at_most(1), "n_group topk_group n_shared_experts first_k_dense_replace"),
    (_fixed(24), "kv_lora_rank"),
    (_number(40), "q_lora_rank"),
    (
        _at_most(8),
        "qk_rope_head_dim rotary_dim patch_size num_queries num_query_tokens num_latents",
    ),
    (_fixed(16), "qk_nope_head_dim mamba_d_state ssm_state_size"),
    (
        _number(16),
        """v_head_dim index_head_dim linear_head_dim linear_key_head_dim
        linear_value_head_dim""",
    ),
    (
        _number(4),
        """index_n_heads index_topk mm_tokens_per_image linear_num_heads
        linear_num_value_heads""",
    ),
    (_number(2), "linear_num_key_heads"),
    (_each(32), "image_size conv_dim tdnn_dim xvector_output_dim classifier_proj_size"),
    (_each(1), "depths"),
    (_at_most(16), "num_mel_bins num_conv_pos_embeddings mamba_chunk_size chunk_size"),
    (_at_most(8), "sliding_window local_attention sliding_window_size keep_window_size"),
    (_window, "window_size"),
    (_at_most(64), "codebook_size num_codevectors_per_group"),
    (_number(32), "num_pos_feats"),
    (_number(8), "encoder_stride"),
    (_fixed(False), "use_cache"),
)


RULES: dict[str, Rule] = {name: rule for rule, names in _ROWS for name in names.split()}
_KV_FIELDS = frozenset({"num_key_value_heads", "swa_num_key_value_heads"})
_HEAD_DIM_FIELDS = frozenset(
    {"head_dim", "swa_head_dim", "d_kv", "d_head", "resampler_head_dim", "kv_channels"}
)

_TOKEN_FIELD = re.compile(r"_token_(id|index)$")
_TOKENS = {
    "pad": 0,
    "bos": 1,
    "cls": 1,
    "decoder_start": 1,
    "forced_bos": 1,
    "eos": 2,
    "sep": 2,
    "forced_eos": 2,
    "unk": 3,
    "mask": 4,
    "image": 100,
    "video": 101,
    "audio": 102,
    "vision_start": 103,
    "vision_end": 104,
    "boi": 105,
    "eoi": 106,
    "boa": 107,
    "eoa": 108,
    "image_bos": 109,
    "audio_bos": 110,
    "blank": 111,
    "question": 112,
}


@dataclass(frozen=True)
class Defaults:
    """What the defaults of a config class say about its attention before anything shrinks."""

    heads: int | None
    width: int | None
    is_text: bool

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Defaults:
        """Read the defaults from a config's fields.

        >>> Defaults.of({"n_head": 12, "n_embd": 768, "vocab_size": 50257})
        Defaults(heads=12, width=768, is_text=True)
        """
        heads = (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
        )
        widths = ("hidden_size", "d_model", "n_embd", "dim")
        return cls(
            heads=next((fields[n] for n in heads if _is_number(fields.get(n))), None),
            width=next((fields[n] for n in widths if _is_number(fields.get(n))), None),
            is_text="vocab_size" in fields,
        )


def tiny_value(name: str, default: Any, defaults: Defaults) -> Any:
    """The tiny value of a field, or its default where no rule shrinks it.

    >>> tiny_value("hidden_size", 4096, Defaults(32, 4096, True))
    64
    """
    if name in RULES:
        return RULES[name](default)
    if name in _KV_FIELDS and _is_number(default):
        return _kv_heads(default, defaults)
    if name in _HEAD_DIM_FIELDS and _is_number(default):
        return _head_dim(name, default, defaults)
    if _TOKEN_FIELD.search(name):
        return _token(name, default)
    return default


def _kv_heads(default: int, defaults: Defaults) -> int:
    """Keep the kind: multi-query stays 1, multi-head stays as many as queries, the rest groups."""
    if default == 1:
        return 1
    return HEADS if default == defaults.heads else KV_HEADS


def _head_dim(name: str, default: int, defaults: Defaults) -> int:
    """Where heads times head dim is not the width (gemma, qwen3), it stays so."""
    heads, width = defaults.heads, defaults.width
    decoupled = heads and width and heads * default != width
    is_wide = decoupled and defaults.is_text and name == "head_dim"
    return WIDE_HEAD_DIM if is_wide else HEAD_DIM


def _token(name: str, default: Any) -> Any:
    token = _TOKENS.get(_TOKEN_FIELD.sub("", name), 120)
    if _is_number(default):
        return token if default >= 0 else default
    if isinstance(default, (list, tuple)) and default and isinstance(default[0], int):
        return type(default)([token])
    return default
