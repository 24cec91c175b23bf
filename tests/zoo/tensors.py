"""Example tensors: words, noise, images, and words with room for an image's tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tests.zoo.fields import BATCH, SEQUENCE

__all__ = [
    "IMAGE_TOKEN",
    "first_of",
    "image_grid",
    "image_tokens",
    "images",
    "noise",
    "parameters_of_forward",
    "sub_config",
    "text",
    "with_image_tokens",
    "words",
]

IMAGE_TOKEN = 100
_IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index", "media_placeholder_token_id")
_VISION_PARTS = ("vision_config", "image_config", "backbone_config", "encoder")


def noise(*shape: int) -> Tensor:
    """Normal noise, the same at every call.

    >>> noise(2, 3).shape
    torch.Size([2, 3])
    """
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def words(batch: int = BATCH, length: int = SEQUENCE, low: int = 8, high: int = 90) -> Tensor:
    """Token ids that stay clear of the special tokens below `low` and from `high`.

    >>> words(1, 3).shape
    torch.Size([1, 3])
    """
    return torch.randint(low, high, (batch, length), generator=torch.Generator().manual_seed(0))


def text(token_ids: Tensor | None = None) -> dict[str, Tensor]:
    """Token ids with an attention mask of ones.

    >>> sorted(text())
    ['attention_mask', 'input_ids']
    """
    token_ids = words() if token_ids is None else token_ids
    return {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}


def images(config: PreTrainedConfig) -> Tensor:
    """A batch of images of the size and channels that the config asks for."""
    vision = sub_config(config, *_VISION_PARTS) or config
    sizes = ("image_size", "img_size")
    size = first_of(config, *sizes) or first_of(vision, *sizes) or 32
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else size
    channels = first_of(vision, "num_channels", "in_channels", "in_chans")
    channels = channels or first_of(config, "num_channels")
    return noise(BATCH, channels if isinstance(channels, int) else 3, height, width)


def image_grid(vision: PreTrainedConfig) -> tuple[Tensor, Tensor, int]:
    """Flattened patches of one image per example, the images' grids, and the tokens of each."""
    patch = first_of(vision, "patch_size") or 8
    patch = patch if isinstance(patch, int) else patch[-1]
    frames = first_of(vision, "temporal_patch_size") or 1
    frames = frames if isinstance(frames, int) else frames[0]
    channels = first_of(vision, "in_channels", "num_channels", "in_chans") or 3
    side = 2 * (first_of(vision, "spatial_merge_size", "merge_size") or 2)
    pixels = noise(BATCH * side * side, channels * frames * patch * patch)
    return pixels, torch.tensor([[1, side, side]] * BATCH), 4


def with_image_tokens(
    config: PreTrainedConfig, count: int, token: int | None = None
) -> dict[str, Tensor]:
    """Eight words with `count` image tokens after the third, and their attention mask."""
    if token is None:
        token = first_of(config, *_IMAGE_TOKEN_FIELDS) or IMAGE_TOKEN
    sentence = words(BATCH, 8)
    pictures = torch.full((BATCH, count), token)
    return text(torch.cat([sentence[:, :3], pictures, sentence[:, 3:]], 1))


def image_tokens(output: Any, width: int) -> int:
    """How many tokens of `width` an image encoder returned, over the whole batch."""
    if getattr(output, "pooler_output", None) is not None:
        output = output.pooler_output
    elif hasattr(output, "last_hidden_state"):
        output = output.last_hidden_state
    if isinstance(output, (list, tuple)):
        parts = [part for part in output if isinstance(part, (Tensor, list, tuple))]
        return sum(image_tokens(part, width) for part in parts)
    return int(output.numel()) // width


def first_of(config: PreTrainedConfig, *names: str) -> Any:
    """The first of these fields that the config has and that is not None."""
    return next((v for name in names if (v := getattr(config, name, None)) is not None), None)


def sub_config(config: PreTrainedConfig, *names: str) -> PreTrainedConfig | None:
    """The first of these fields that holds a config."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, PreTrainedConfig)), None)


def parameters_of_forward(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters that the class's forward declares, `self` among them."""
    return inspect.signature(type(model).forward).parameters
