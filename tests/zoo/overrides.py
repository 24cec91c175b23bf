"""What single architectures need beyond the rules of `fields.py`: config values, classes, variants.

Everything here earns its place: without it the tiny config is rejected, the forward fails, no
attention layer survives the shrinking, or the flavour of the popular checkpoints is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CLASSES", "DROP", "OVERRIDES", "SUB_CONFIG_TYPES", "VARIANTS", "Variant"]

Values = Mapping[str, Any]

DROP = object()
"""As a value: leave the field at its own default, whatever the rules say."""

_GROUPED_QUERIES = {"num_key_value_heads": 2}
_LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
_SWIN = {"num_heads": (2, 4), "depths": (2, 1), "window_size": 4, "embed_dim": 32}
_SWIN_BACKBONE = {
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 2, 4),
    "window_size": 4,
    "embed_dim": 16,
}
_IMAGE_TOKENS = {f"IMGIMG{chr(ord('A') + i)}Z": 10 + i for i in range(16)}

OVERRIDES: dict[str, Values] = {
    "align_text_model": {"projection_dim": 640},
    "arcee": _GROUPED_QUERIES,
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32, "patch_size": 16},
    "bailing_hybrid": _LINEAR_THEN_FULL,
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "beit": {"use_relative_position_bias": True},
    "big_bird": {"block_size": 4, "num_random_blocks": 1, "attention_type": "original_full"},
    "bigbird_pegasus": {"block_size": 4, "num_random_blocks": 1},
    "blip-2": {
        "num_query_tokens": 4,
        "text_config": {"is_decoder": True},
        "image_token_index": 100,
    },
    "chameleon": {
        "vq_config": {
            "embed_dim": 32,
            "latent_channels": 32,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "num_embeddings": 16,
        },
        "vocabulary_map": {"<image>": 100, **_IMAGE_TOKENS},
    },
    "clap_audio_model": {
        "spec_size": 64,
        "patch_embeds_hidden_size": 16,
        "hidden_size": 32,
        "depths": (1, 1),
        "num_attention_heads": (2, 4),
        "window_size": 4,
    },
    "cohere_compass_text": {
        "rope_parameters": {"sliding_attention": _MROPE, "full_attention": _MROPE}
    },
    "deberta": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "max_relative_positions": 16,
        "position_biased_input": False,
    },
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "donut-swin": _SWIN,
    "dots1": {
        **_GROUPED_QUERIES,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "encodec": {
        "num_filters": 8,
        "num_lstm_layers": 1,
        "target_bandwidths": (1.5,),
        "hidden_size": 32,
    },
    "esm": {
        "vocab_size": 33,
        "pad_token_id": 1,
        "mask_token_id": 32,
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
    },
    "funnel": {"block_sizes": (1, 1), "num_decoder_layers": 1},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_unified_text": {"hidden_size_per_layer_input": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granite": _GROUPED_QUERIES,
    "granite_speech5_encoder": {"context_size": 8},
    "granite_speech_encoder": {"context_size": 8, "max_pos_emb": 16, "input_dim": 32},
    "granite_speech_plus_encoder": {"context_size": 8, "max_pos_emb": 16, "input_dim": 32},
    "granitemoehybrid": {"layer_types": ["attention", "attention"]},
    "grounding-dino": {
        "backbone_config": {**_SWIN_BACKBONE, "out_features": ["stage2", "stage3", "stage4"]},
        "max_text_len": 16,
    },
    "helium": _GROUPED_QUERIES,
    "hunyuan_v1_dense": {**_GROUPED_QUERIES, "head_dim": 16},
    "idefics2_perceiver": {"resampler_n_latents": 4},
    "idefics3": {"pixel_shuffle_factor": 2},
    "instructblip": {"num_query_tokens": 4, "image_token_index": 100},
    "instructblipvideo": {"num_query_tokens": 4, "video_token_index": 101},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": _LINEAR_THEN_FULL,
    "kosmos_2_5_vision_model": {"patch_embed_hidden_size": 192, "patch_size": 8},
    "layoutlmv3": {
        "coordinate_size": 8,
        "shape_size": 16,
        "has_relative_attention_bias": True,
        "has_spatial_attention_bias": True,
        "visual_embed": False,
    },
    "levit": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "mlp_ratio": [2, 2, 2],
        "attention_ratio": [2, 2, 2],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "llama": _GROUPED_QUERIES,
    "llama4_vision_model": {"intermediate_size": 256},
    "luke": {"entity_vocab_size": 32},
    "lw_detr": {
        "backbone_config": {"out_indices": [1, 2], "out_features": DROP},
        "projector_scale_factors": [1.0],
        "decoder_n_points": 2,
        "group_detr": 1,
        "c2f_num_blocks": 1,
    },
    "lw_detr_vit": {
        "image_size": 64,
        "pretrain_image_size": 64,
        "num_windows": 4,
        "window_block_indices": [0],
    },
    "lxmert": {"l_layers": 2, "x_layers": 1, "r_layers": 1},
    "maskformer": {
        "backbone_config": {
            **_SWIN_BACKBONE,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        }
    },
    "mimi_encoder": {
        "num_filters": 8,
        "upsample_groups": 32,
        "vector_quantization_hidden_dimension": 64,
        "num_quantizers": 4,
        "codebook_dim": 64,
    },
    "minimax": _LINEAR_THEN_FULL,
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mllama_vision_model": {
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 192,
        "num_global_layers": 1,
    },
    "mobilevitv2": {"image_size": 128, "base_attn_unit_dims": (32, 48, 64)},
    "modernvbert": {"scale_factor": 2, "pixel_shuffle_factor": 2},
    "nemotron": _GROUPED_QUERIES,
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention"]},
    "olmo2": _GROUPED_QUERIES,
    "paddleocr_vl_text": {"rope_parameters": {**_MROPE, "mrope_section": [4, 6, 6]}},
    "phi": _GROUPED_QUERIES,
    "phi3": _GROUPED_QUERIES,
    "pix2struct_vision_model": {"patch_embed_hidden_size": 48, "initializer_range": 0.02},
    "pocket_tts_audio_tokenizer_encoder": {"upsample_groups": 32},
    "qwen2": _GROUPED_QUERIES,
    "qwen3_next": _LINEAR_THEN_FULL,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "local_attn_chunk_length": 4,
    },
    "rt_detr": {
        "backbone_config": {
            "hidden_sizes": [16, 32, 32, 64],
            "embedding_size": 16,
            "out_features": ["stage2", "stage3", "stage4"],
        },
        "encoder_in_channels": [32, 32, 64],
        "decoder_in_channels": [64, 64, 64],
        "num_denoising": 0,
        "decoder_ffn_dim": 64,
        "encoder_ffn_dim": 64,
    },
    "sam_hq_mask_decoder": {"iou_head_hidden_dim": 64, "vit_dim": 64},
    "sam_hq_prompt_encoder": {"mask_input_channels": 8},
    "sam_hq_vision_model": {"global_attn_indexes": (1,), "mlp_dim": 128},
    "sam_mask_decoder": {"iou_head_hidden_dim": 64, "vit_dim": 64},
    "sam_prompt_encoder": {"mask_input_channels": 8},
    "sam_vision_model": {"global_attn_indexes": (1,), "mlp_dim": 128},
    "segformer": {
        "num_attention_heads": (1, 2, 4, 8),
        "hidden_sizes": (16, 32, 64, 64),
        "decoder_hidden_size": 32,
    },
    "siglip2_vision_model": {"num_patches": 16},
    "smolvlm": {"pixel_shuffle_factor": 2},
    "speech_to_text": {"input_feat_per_channel": 16, "input_channels": 1, "conv_channels": 32},
    "stablelm": _GROUPED_QUERIES,
    "swin": _SWIN,
    "swinv2": _SWIN,
    "time_series_transformer": {
        "prediction_length": 3,
        "context_length": 8,
        "lags_sequence": [1, 2],
        "num_time_features": 2,
    },
    "vivit": {"tubelet_size": [2, 8, 8], "num_frames": 4},
    "wav2vec2-bert": {"vocab_size": 32, "feature_projection_input_dim": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "xclip": {"prompt_layers": 1, "prompt_num_attention_heads": 4},
    "xclip_vision_model": {
        "mit_hidden_size": 64,
        "mit_intermediate_size": 64,
        "mit_num_attention_heads": 4,
    },
    "xmod": {"default_language": "en_XX"},
}

CLASSES: dict[str, str] = {
    "clip": "CLIPModel",
    "metaclip_2": "MetaClip2Model",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "sam3_video": "Sam3TrackerModel",
    "siglip": "SiglipModel",
}
"""The class to build where the first one of `build.TASKS` leaves out a tower or fails."""

SUB_CONFIG_TYPES: dict[str, dict[str, str]] = {
    "llava": {"vision_config": "clip_vision_model", "text_config": "llama"},
    "musicgen": {"text_encoder": "t5", "audio_encoder": "encodec"},
    "musicgen_melody": {"text_encoder": "t5", "audio_encoder": "encodec"},
}


@dataclass(frozen=True)
class Variant:
    """Another flavour of an architecture: extra config values, another class of the same model."""

    config: Values = field(default_factory=dict)
    model_class: str | None = None


VARIANTS: dict[str, Variant] = {
    "albert:groups": Variant({"num_hidden_groups": 2}),
    "bart:decoder": Variant(model_class="BartForCausalLM"),
    "bart:encoder": Variant(model_class="BartEncoder"),
    "bert:cross_attention": Variant(
        {"is_decoder": True, "add_cross_attention": True}, "BertLMHeadModel"
    ),
    "bert:question_answering": Variant(model_class="BertForQuestionAnswering"),
    "big_bird:block_sparse": Variant(
        {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
    ),
    "blip:retrieval": Variant(model_class="BlipForImageTextRetrieval"),
    "blip:towers": Variant(model_class="BlipModel"),
    "clip:classification": Variant(model_class="CLIPForImageClassification"),
    "cohere:qk_norm": Variant({"use_qk_norm": True}),
    "deberta:talking_head": Variant({"talking_head": True}),
    "deberta-v2:separate": Variant({"share_att_key": False}),
    "falcon:alibi": Variant({"alibi": True}),
    "falcon:mha": Variant({"multi_query": False}),
    "falcon:new_decoder": Variant(
        {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False}
    ),
    "gpt2:cross_attention": Variant({"add_cross_attention": True}),
    "gpt2:inverse_layer_idx": Variant({"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox:sequential": Variant({"use_parallel_residual": False}),
    "llama:head_dim": Variant({"head_dim": 32}),
    "llama:mha": Variant({"num_key_value_heads": 4}),
    "llama:mqa": Variant({"num_key_value_heads": 1}),
    "marian:decoder": Variant(model_class="MarianForCausalLM"),
    "mbart:decoder": Variant(model_class="MBartForCausalLM"),
    "mllama:image": Variant(),
    "mpt:clip_qkv": Variant({"attn_config": {"clip_qkv": 8.0}}),
    "mt5:encoder": Variant(model_class="MT5EncoderModel"),
    "opt:post_norm": Variant({"do_layer_norm_before": False}),
    "pegasus:decoder": Variant(model_class="PegasusForCausalLM"),
    "phi:qk_layernorm": Variant({"qk_layernorm": True}),
    "siglip:classification": Variant(model_class="SiglipForImageClassification"),
    "stablelm:qk_layernorm": Variant({"qk_layernorm": True}),
    "t5:encoder": Variant(model_class="T5EncoderModel"),
    "t5:gated": Variant({"feed_forward_proj": "gated-gelu"}),
    "vit_mae:pretraining": Variant(model_class="ViTMAEForPreTraining"),
    "whisper:conditional": Variant(model_class="WhisperForConditionalGeneration"),
    "whisper:encoder": Variant(model_class="WhisperForAudioClassification"),
}
"""Variants by name. An encoder-decoder without a colon is the whole model, whisper excepted."""
