"""Tiny models of diffusers; importing it without diffusers installed is fine, building is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.handwritten.common import Entry, Example, expects

__all__ = ["DIFFUSERS"]

_BATCH, _TEXT, _SIDE = 3, 7, 8
_CHANNELS, _HEADS, _HEAD_DIM, _TEXT_WIDTH, _POOLED_WIDTH = 4, 4, 12, 20, 36


def _image(channels: int = _CHANNELS) -> Tensor:
    return torch.randn(_BATCH, channels, _SIDE, _SIDE)


def _caption() -> Tensor:
    return torch.randn(_BATCH, _TEXT, _TEXT_WIDTH)


def _times() -> Tensor:
    return torch.tensor([5, 90, 700])


def _written_out(model: Any) -> nn.Module:
    """The model with its attention as matrix products instead of SDPA."""
    from diffusers.models.attention_processor import AttnProcessor

    model.set_attn_processor(AttnProcessor())
    for block in getattr(model, "transformer_blocks", ()):
        for attention in (block.attn1, block.attn2):
            if attention is not None:
                attention.set_processor(AttnProcessor())
    assert isinstance(model, nn.Module)
    return model


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        in_channels=_CHANNELS,
        out_channels=_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(_HEADS * _HEAD_DIM, 2 * _HEADS * _HEAD_DIM),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=_HEADS,
    )


def _unet_inputs() -> dict[str, Any]:
    return {"sample": _image(), "timestep": _times(), "encoder_hidden_states": _caption()}


@expects(attentions=8, prunable=8)
def unet() -> Example:
    """Stable Diffusion's U-Net: self- and cross-attention at two resolutions."""
    return _unet(), _unet_inputs()


@expects(attentions=8, prunable=8)
def unet_eager() -> Example:
    """The same with batch and heads merged, and the softmax written out."""
    return _written_out(_unet()), _unet_inputs()


@expects(attentions=4, prunable=4)
def unet_unconditional() -> Example:
    """DDPM's U-Net: self-attention on images, with a group norm in front."""
    from diffusers import UNet2DModel

    model = UNet2DModel(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(24, _HEADS * _HEAD_DIM),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=_HEAD_DIM,
    )
    return model, {"sample": _image(3), "timestep": _times()}


@expects(attentions=4, prunable=4)
def transformer_2d() -> Example:
    """Two transformer blocks over an image, each with self- and cross-attention."""
    from diffusers import Transformer2DModel

    model = Transformer2DModel(
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_DIM,
        in_channels=24,
        num_layers=2,
        norm_num_groups=8,
        cross_attention_dim=_TEXT_WIDTH,
    )
    return model, {"hidden_states": _image(24), "encoder_hidden_states": _caption()}


@expects(attentions=2, prunable=2)
def dit() -> Example:
    """A diffusion transformer: patches, class labels, adaptive norms."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_DIM,
        in_channels=_CHANNELS,
        num_layers=2,
        norm_num_groups=8,
        sample_size=_SIDE,
        num_embeds_ada_norm=10,
    )
    labels = torch.tensor([1, 4, 9])
    return model, {"hidden_states": _image(), "timestep": _times(), "class_labels": labels}


@expects(attentions=4, prunable=4)
def pixart() -> Example:
    """PixArt's transformer: self-attention and cross-attention to a caption."""
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_DIM,
        in_channels=_CHANNELS,
        num_layers=2,
        norm_num_groups=8,
        cross_attention_dim=_HEADS * _HEAD_DIM,
        sample_size=_SIDE,
        caption_channels=_TEXT_WIDTH,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": _image(),
        "encoder_hidden_states": _caption(),
        "timestep": _times(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs


@expects(attentions=2, prunable=2)
def sd3() -> Example:
    """Stable Diffusion 3: image and text attend jointly, each with its own projections."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=_SIDE,
        in_channels=_CHANNELS,
        num_layers=2,
        attention_head_dim=_HEAD_DIM,
        num_attention_heads=_HEADS,
        joint_attention_dim=_TEXT_WIDTH,
        caption_projection_dim=_HEADS * _HEAD_DIM,
        pooled_projection_dim=_POOLED_WIDTH,
        out_channels=_CHANNELS,
        pos_embed_max_size=_SIDE,
        qk_norm="rms_norm",
    )
    inputs = {
        "hidden_states": _image(),
        "encoder_hidden_states": _caption(),
        "pooled_projections": torch.randn(_BATCH, _POOLED_WIDTH),
        "timestep": _times(),
    }
    return model, inputs


@expects(attentions=2, prunable=2)
def flux() -> Example:
    """Flux: a joint block, then a block whose output projection also reads the feed-forward."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=_HEAD_DIM,
        num_attention_heads=_HEADS,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_POOLED_WIDTH,
        axes_dims_rope=(4, 4, 4),
    )
    inputs = {
        "hidden_states": torch.randn(_BATCH, 11, _CHANNELS),
        "encoder_hidden_states": _caption(),
        "pooled_projections": torch.randn(_BATCH, _POOLED_WIDTH),
        "timestep": _times() / 1000,
        "img_ids": torch.rand(11, 3) * 4,
        "txt_ids": torch.zeros(_TEXT, 3),
    }
    return model, inputs


DIFFUSERS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        dit,
        flux,
        pixart,
        sd3,
        transformer_2d,
        unet,
        unet_eager,
        unet_unconditional,
    )
}
"""Every diffusers model by name; calling an entry gives the model and its inputs."""
