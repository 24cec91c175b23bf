"""Example inputs: in the form that export takes, or derived from the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxslim.program import flat_inputs

__all__ = ["Inputs", "as_inputs", "call_with", "example_inputs_for"]

Inputs = torch.Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""One tensor, positional inputs, or keyword inputs."""

_BATCH, _LENGTH, _SAMPLES = 2, 11, 16000


def as_inputs(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`inputs` as (positional, keyword).

    Tensors that were made in inference mode are copied: they may not be saved for a backward pass.

    Raises:
        TypeError: they are neither a tensor, nor a tuple, list or mapping with a tensor in it.
    """
    leaves = pytree.tree_leaves(inputs)
    if any(isinstance(leaf, torch.Tensor) and leaf.is_inference() for leaf in leaves):
        with torch.inference_mode(False):
            inputs = pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, (tuple, list)) and inputs:
        return tuple(inputs), {}
    if isinstance(inputs, Mapping) and len(inputs):
        return (), {str(name): value for name, value in inputs.items()}
    raise TypeError(
        "example_inputs must be a tensor, a tuple (positional) or a dict (keyword) of inputs, "
        f"not {type(inputs).__name__}{'' if inputs else ' that is empty'}"
    )


def call_with(module: nn.Module, inputs: Inputs) -> Any:
    """Call `module` with `inputs` in any of their forms.

    Raises:
        TypeError: `module` is a program that was captured with other inputs.
    """
    args, kwargs = as_inputs(inputs)
    if isinstance(module, fx.GraphModule):
        flat_inputs(module, args, kwargs)
    return module(*args, **kwargs)


def example_inputs_for(model: nn.Module) -> Inputs:
    """Inputs that fit the model, from its own description of itself or its first layer.

    Raises:
        ValueError: the model does not tell; says what to pass.
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is not None and isinstance(main, str):
        return _from_config(model, config, main)
    parameters = inspect.signature(model.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
    first = next((m for m in model.modules() if isinstance(m, _LAYERS)), None)
    if first is None or len(required) != 1:
        names = ", ".join(p.name for p in required) or "none"
        raise ValueError(
            f"no inputs can be derived for {type(model).__name__} (its forward requires: {names}); "
            "pass example_inputs: a tuple of positional or a dict of keyword tensors, batch 2 or "
            "more"
        )
    return (_for_layer(first),)


_LAYERS = (nn.Embedding, nn.Linear, nn.Conv1d, nn.Conv2d)


def _for_layer(layer: nn.Module) -> torch.Tensor:
    """An input that a first layer takes."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(layer, nn.Embedding):
        return torch.arange(_BATCH * _LENGTH, device=weight.device).reshape(_BATCH, -1) % len(
            weight
        )
    return torch.randn(_input_shape(layer), device=weight.device, dtype=weight.dtype)


def _input_shape(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Conv2d):
        side = 8 * max(layer.kernel_size[0], 4)
        return (_BATCH, layer.in_channels, side, side)
    if isinstance(layer, nn.Conv1d):
        return (_BATCH, layer.in_channels, 8 * layer.kernel_size[0])
    assert isinstance(layer, nn.Linear)
    return (_BATCH, _LENGTH, layer.in_features)


def _from_config(model: nn.Module, config: Any, main: str) -> dict[str, Any]:
    """The main input that a transformers model names, and the masks that go with it."""
    accepted = inspect.signature(model.forward).parameters
    weight = next(model.parameters())
    inputs: dict[str, Any] = {}
    if main == "input_ids":
        inputs[main] = _ids(config, weight.device)
        if "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones_like(inputs[main])
    elif main == "pixel_values":
        inputs[main] = torch.randn(_picture(config), device=weight.device, dtype=weight.dtype)
    elif main in ("input_values", "input_features"):
        size = _sound(config, main)
        inputs[main] = torch.randn(size, device=weight.device, dtype=weight.dtype)
    else:
        raise ValueError(
            f"{type(model).__name__} takes {main!r}, for which no example can be made up; "
            f"pass example_inputs={{{main!r}: ...}}"
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _ids(config, weight.device)[:, :-4]
    return inputs


def _ids(config: Any, device: torch.device) -> torch.Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    entries = int(getattr(text, "vocab_size", 100))
    ids = torch.arange(_BATCH * _LENGTH, device=device).reshape(_BATCH, _LENGTH)
    return ids * 7 % max(entries - 10, 1) + min(5, entries - 1)


def _picture(config: Any) -> tuple[int, ...]:
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", 224)
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    return (_BATCH, int(getattr(vision, "num_channels", 3)), int(height), int(width))


def _sound(config: Any, main: str) -> tuple[int, ...]:
    if main == "input_values":
        return (_BATCH, _SAMPLES)
    frames = 2 * int(getattr(config, "max_source_positions", 100))
    return (_BATCH, int(getattr(config, "num_mel_bins", 80)), frames)
