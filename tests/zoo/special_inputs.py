"""Example inputs of the architectures whose forward signature does not tell what they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from tests.zoo.fields import BATCH, SEQUENCE, WIDTH
from tests.zoo.tensors import (
    image_grid,
    images,
    noise,
    parameters_of_forward,
    text,
    with_image_tokens,
    words,
)

__all__ = ["SPECIAL_INPUTS", "Inputs"]

Inputs = dict[str, Any]
InputMaker = Callable[[nn.Module, PreTrainedConfig], Inputs]


def _text(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return dict(text())


def _text_and_image(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {**text(), "pixel_values": images(config)}


def _long_text(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return dict(text(words(BATCH, 32)))


def _text_and_boxes(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    corners = words(low=0, high=60).unsqueeze(-1)
    return {**text(), "bbox": torch.cat([corners, corners, corners + 9, corners + 9], -1)}


def _text_and_corners(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {**text(), "bbox": noise(BATCH, SEQUENCE, 8).abs()}


def _image(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {"pixel_values": images(config)}


def _image_of(size: int) -> InputMaker:
    return lambda model, config: {"pixel_values": noise(BATCH, 3, size, size)}


def _video(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    size = config.image_size
    return {"pixel_values": noise(BATCH, config.num_frames, 3, size, size)}


def _waveform(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {"input_values": noise(BATCH, 1, 3200)}


def _audio_features(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {"input_features": noise(BATCH, 32, 64)}


def _image_tokens(count: int) -> InputMaker:
    return lambda model, config: {
        **with_image_tokens(config, count),
        "pixel_values": images(config),
    }


def _one_image_each(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {**with_image_tokens(config, 4), "pixel_values": noise(BATCH, 1, 3, 32, 32)}


def _instruct_blip(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {**_image_tokens(4)(model, config), "qformer_input_ids": words(BATCH, 5)}


def _instruct_blip_video(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {
        **with_image_tokens(config, 8, token=config.video_token_index),
        "pixel_values": noise(BATCH, 2, 3, 32, 32),
        "qformer_input_ids": words(BATCH, 5),
    }


def _query_transformer(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {
        "input_ids": words(BATCH, 5),
        "attention_mask": torch.ones(BATCH, 9, dtype=torch.long),
        "query_embeds": noise(BATCH, 4, config.hidden_size),
        "encoder_hidden_states": noise(BATCH, 16, config.encoder_hidden_size),
    }


def _segment_anything(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {
        "pixel_values": noise(BATCH, 3, 32, 32),
        "input_points": noise(BATCH, 1, 2, 2).abs() * 8,
        "input_labels": torch.ones(BATCH, 1, 2, dtype=torch.long),
        "multimask_output": True,
    }


def _patch_grid(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    pixels, grid, _ = image_grid(config)
    names = list(parameters_of_forward(model))
    return {names[1]: pixels, "grid_thw" if "grid_thw" in names else "image_grid_thw": grid}


def _decoded_codes(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {**text(), "decoder_input_ids": words(BATCH * config.decoder.num_codebooks, 7, high=60)}


def _text_after_context(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {**text(), "encoder_hidden_states": noise(BATCH, 7, WIDTH)}


def _image_tiles(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {
        **text(),
        "pixel_values": noise(BATCH, 1, 4, 3, 32, 32),
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(BATCH, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(BATCH, SEQUENCE, 1, 4, dtype=torch.long),
    }


def _masked_image(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {"pixel_values": images(config), "noise": noise(BATCH, 16)}


def _byte_patches(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {
        "input_ids": words(),
        "patch_embeds": None,
        "num_patches": 4,
        "patch_ids": torch.arange(SEQUENCE).expand(BATCH, -1) // 3,
    }


def _text_and_regions(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    regions, boxes = noise(BATCH, 5, config.visual_feat_dim), noise(BATCH, 5, config.visual_pos_dim)
    return {**text(), "visual_feats": regions, "visual_pos": boxes}


def _spectrogram(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    return {"input_values": noise(BATCH, config.max_length, config.num_mel_bins)}


def _speech(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    features = noise(BATCH, 32, config.input_feat_per_channel)
    return {"input_features": features, "decoder_input_ids": words(BATCH, 7)}


def _image_patches(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    """Patches with their row and column before the pixels."""
    places = words(BATCH, 12, low=1, high=5).view(BATCH, 6, 2).float()
    pixels = noise(BATCH, 6, config.patch_embed_hidden_size)
    return {"flattened_patches": torch.cat([places, pixels], -1)}


def _time_series(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length
    return {
        "past_values": noise(BATCH, past).abs(),
        "past_time_features": noise(BATCH, past, config.num_time_features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": noise(BATCH, future).abs(),
        "future_time_features": noise(BATCH, future, config.num_time_features),
    }


SPECIAL_INPUTS: dict[str, InputMaker] = {
    "audio-spectrogram-transformer": _spectrogram,
    "bert:cross_attention": _text_after_context,
    "big_bird:block_sparse": _long_text,
    "blip": _text_and_image,
    "blip-2": _image_tokens(4),
    "blt_local_encoder": _byte_patches,
    "bridgetower_vision_model": lambda model, config: {"image": images(config)},
    "bros": _text_and_corners,
    "chameleon": _text,
    "clap": lambda model, config: {**text(), "input_features": noise(BATCH, 1, 64, 16)},
    "clipseg": _text_and_image,
    "conditional_detr": _image_of(64),
    "dab-detr": _image_of(64),
    "deepseek_ocr2": _text,
    "deepseek_vl_hybrid": _text,
    "deformable_detr": _image_of(64),
    "detr": _image_of(64),
    "gemma4_unified": _text,
    "gpt2:cross_attention": _text_after_context,
    "granite_speech5_ctc": _audio_features,
    "granite_speech5_encoder": _audio_features,
    "granite_speech_encoder": lambda model, config: {
        "hidden_states": noise(BATCH, 32, config.input_dim)
    },
    "grounding-dino": lambda model, config: {
        **text(words(BATCH, 8)),
        "pixel_values": noise(BATCH, 3, 64, 64),
    },
    "idefics2_perceiver": lambda model, config: {
        "context": noise(BATCH, 16, WIDTH),
        "attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
    },
    "idefics3": _one_image_each,
    "inkling2": _text,
    "inkling_mm_model": _text,
    "instructblip": _instruct_blip,
    "instructblip_qformer": _query_transformer,
    "instructblipvideo": _instruct_blip_video,
    "layoutlm": _text_and_boxes,
    "layoutlmv3": _text_and_boxes,
    "lfm2_vl": _text,
    "llama4_vision_model": _image_of(32),
    "llava": _image_tokens(16),
    "lw_detr": _image_of(64),
    "lxmert": _text_and_regions,
    "maskformer": _image_of(64),
    "mimi_encoder": _waveform,
    "minimax_m3_vl_vision": _patch_grid,
    "mllama": _text,
    "mllama:image": _image_tiles,
    "mobilevitv2": _image,
    "modernvbert": _one_image_each,
    "muse_glimmer": _text,
    "musicgen": _decoded_codes,
    "musicgen_melody": _decoded_codes,
    "pix2struct_vision_model": _image_patches,
    "pocket_tts_audio_tokenizer_encoder": _waveform,
    "rt_detr": _image_of(64),
    "sam": _segment_anything,
    "sam_hq": _segment_anything,
    "smolvlm": _one_image_each,
    "speech_to_text": _speech,
    "table-transformer": _image_of(64),
    "time_series_transformer": _time_series,
    "timesformer": _video,
    "unlimited_ocr": _text,
    "videomae": _video,
    "vit_mae:pretraining": _masked_image,
    "vivit": _video,
    "voxtral": _text,
    "wav2vec2-bert": lambda model, config: {"input_features": noise(BATCH, 40, 32)},
    "xclip": lambda model, config: {
        "input_ids": words(),
        "pixel_values": noise(BATCH, 4, 3, 32, 32),
    },
    "xcodec": _waveform,
    "yolos": _image,
}
