"""Example inputs of a model, read off the signature of its forward."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tests.zoo.fields import BATCH, SEQUENCE, VOCAB, WIDTH
from tests.zoo.special_inputs import SPECIAL_INPUTS, Inputs
from tests.zoo.tensors import (
    IMAGE_TOKEN,
    first_of,
    image_grid,
    image_tokens,
    images,
    noise,
    parameters_of_forward,
    sub_config,
    text,
    with_image_tokens,
    words,
)

__all__ = ["example_inputs"]

_OTHER_MAIN_INPUTS = ("input_values", "input_features", "pixel_values", "past_values")
_IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index")


def example_inputs(model: nn.Module, config: PreTrainedConfig, name: str) -> Inputs:
    """The keyword arguments of an example call: a batch of two, twelve words, 32-pixel images.

    Args:
        model: A model of `build`.
        config: Its config.
        name: The architecture or variant it was built for.
    """
    make = SPECIAL_INPUTS.get(name) or SPECIAL_INPUTS.get(name.partition(":")[0])
    if make is not None:
        return make(model, config)
    declared = parameters_of_forward(model)
    vision = sub_config(config, "vision_config", "vq_config")
    if vision is not None and {"input_ids", "pixel_values"} <= set(declared):
        if "image_grid_thw" in declared:
            return _text_with_grid(model, config, vision)
        if first_of(config, *_IMAGE_TOKEN_FIELDS) is not None and _image_encoder(model) is not None:
            return _text_with_image(model, config)
    return {**_main_inputs(model, config), **_decoder_inputs(model, config)}


def _image_encoder(model: nn.Module) -> Any:
    candidates = (model, getattr(model, "model", None))
    return next((m for m in candidates if hasattr(m, "get_image_features")), None)


def _text_with_grid(model: nn.Module, config: PreTrainedConfig, vision: PreTrainedConfig) -> Inputs:
    pixels, grid, count = image_grid(vision)
    inputs = {"pixel_values": pixels, "image_grid_thw": grid, **with_image_tokens(config, count)}
    return inputs | _token_types(model, config, inputs["input_ids"])


def _text_with_image(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    """Words with as many image tokens as the model's own image encoder returns."""
    declared = parameters_of_forward(model)
    encode = _image_encoder(model).get_image_features
    of_encoder = inspect.signature(encode).parameters
    inputs: Inputs = {"pixel_values": images(config)}
    if "image_sizes" in {*declared, *of_encoder}:
        inputs["image_sizes"] = torch.tensor([inputs["pixel_values"].shape[-2:]] * BATCH)
    with torch.no_grad():
        encoded = encode(**{name: v for name, v in inputs.items() if name in of_encoder})
    width = first_of(config.get_text_config(), "hidden_size", "d_model", "n_embd")
    count = image_tokens(encoded, width) // BATCH
    inputs = {name: value for name, value in inputs.items() if name in declared}
    inputs |= with_image_tokens(config, count)
    return inputs | _token_types(model, config, inputs["input_ids"])


def _token_types(model: nn.Module, config: PreTrainedConfig, token_ids: Tensor) -> Inputs:
    declared = parameters_of_forward(model)
    types: Inputs = {}
    if "token_type_ids" in declared and config.model_type.startswith(("gemma", "paligemma")):
        types["token_type_ids"] = torch.zeros_like(token_ids)
    if "mm_token_type_ids" in declared:
        token = first_of(config, *_IMAGE_TOKEN_FIELDS) or IMAGE_TOKEN
        types["mm_token_type_ids"] = (token_ids == token).long()
    return types


def _main_inputs(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    declared = parameters_of_forward(model)
    inputs: Inputs = {}
    if "input_ids" in declared and model.main_input_name not in _OTHER_MAIN_INPUTS:
        token_ids = words(high=_high(config))
        inputs |= text(token_ids) if "attention_mask" in declared else {"input_ids": token_ids}
    if "pixel_values" in declared and _wants_pixels(model, config):
        inputs["pixel_values"] = images(config)
    return inputs or _continuous_inputs(model, config)


def _high(config: PreTrainedConfig) -> int:
    vocab = first_of(config.get_text_config(), "vocab_size")
    return min(90, vocab if isinstance(vocab, int) else VOCAB)


def _wants_pixels(model: nn.Module, config: PreTrainedConfig) -> bool:
    declared = parameters_of_forward(model)
    return (
        model.main_input_name == "pixel_values"
        or "input_ids" not in declared
        or sub_config(config, "vision_config", "vq_config") is not None
        or declared["pixel_values"].default is inspect.Parameter.empty
    )


def _continuous_inputs(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    declared = parameters_of_forward(model)
    width = first_of(config, "hidden_size", "d_model") or WIDTH
    if "input_values" in declared:
        return {"input_values": noise(BATCH, 4000)}
    if "input_features" in declared:
        return {"input_features": _spectrogram(config)}
    if "hidden_states" in declared:
        return {"hidden_states": noise(BATCH, SEQUENCE, WIDTH)}
    if "inputs_embeds" in declared:
        return {"inputs_embeds": noise(BATCH, SEQUENCE, width)}
    return {}


def _spectrogram(config: PreTrainedConfig) -> Tensor:
    """Mel bands by frames, or frames by mel bands where no encoder length is given."""
    fields = ("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel")
    audio = sub_config(config, "audio_config", "encoder_config") or config
    bands = first_of(config, *fields) or first_of(audio, *fields) or 16
    length = first_of(config, "max_source_positions") or first_of(audio, "max_source_positions")
    return noise(BATCH, bands, 2 * length) if length else noise(BATCH, 64, bands)


def _decoder_inputs(model: nn.Module, config: PreTrainedConfig) -> Inputs:
    hears = model.main_input_name in ("input_features", "input_values")
    if "decoder_input_ids" not in parameters_of_forward(model):
        return {}
    if not (config.is_encoder_decoder or hears):
        return {}
    decoder = sub_config(config, "decoder", "decoder_config")
    high = _high(config if decoder is None else decoder)
    return {"decoder_input_ids": words(BATCH, 7, low=min(8, high - 1), high=high)}
