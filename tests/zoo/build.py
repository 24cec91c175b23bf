"""Build a tiny, randomly initialised model of an architecture, with example inputs."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from tests.zoo.configs import config_class, tiny_config
from tests.zoo.inputs import example_inputs
from tests.zoo.overrides import CLASSES, VARIANTS
from tests.zoo.special_inputs import Inputs

__all__ = ["build", "model_types"]

TASKS = (
    "MODEL_FOR_MASKED_LM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT",
    "MODEL_FOR_CAUSAL_LM",
    "MODEL_FOR_IMAGE_CLASSIFICATION",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ",
    "MODEL_FOR_CTC",
    "MODEL_FOR_VIDEO_CLASSIFICATION",
    "MODEL_FOR_OBJECT_DETECTION",
    "MODEL_FOR_INSTANCE_SEGMENTATION",
    "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION",
    "MODEL",
    "MODEL_FOR_TDT",
)
"""The task whose class is built is the first of these that has one for the architecture."""


@functools.cache
def model_types() -> tuple[str, ...]:
    """The architectures of this zoo, from `types.txt`.

    >>> "bert" in model_types()
    True
    """
    return tuple(Path(__file__).with_name("types.txt").read_text().split())


def build(
    name: str, attn_implementation: str | None = None, seed: int = 0
) -> tuple[nn.Module, Inputs]:
    """A tiny model in eval mode, and the keyword arguments of an example call.

    Args:
        name: An architecture of `types.txt`, or a variant of one (`overrides.VARIANTS`).
        attn_implementation: ``"sdpa"``, ``"eager"``, or None for the architecture's own.
        seed: Of the weights.

    >>> model, inputs = build("bert")
    >>> model(**inputs).logits.shape
    torch.Size([2, 12, 128])
    """
    model_type, _, variant = name.partition(":")
    if model_type not in model_types() or (variant and name not in VARIANTS):
        raise KeyError(f"no {name!r} in this zoo: see tests/zoo/types.txt and overrides.VARIANTS")
    config = tiny_config(name)
    torch.manual_seed(seed)
    model = _instance(_model_class(name), config, attn_implementation).float().eval()
    _fill_constant_parameters(model, seed)
    return model, example_inputs(model, config, name)


def _instance(
    cls: type[PreTrainedModel], config: PreTrainedConfig, attn_implementation: str | None
) -> nn.Module:
    if attn_implementation is None:
        return cls(config)
    config._attn_implementation = attn_implementation
    make: Any = cls._from_config
    model: nn.Module = make(config, attn_implementation=attn_implementation)
    return model


def _fill_constant_parameters(model: nn.Module, seed: int) -> None:
    """Noise where a parameter is all zeros or not finite: a bias table or a gate must count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            if not parameter.isfinite().all():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            elif not parameter.any():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def _model_class(name: str) -> type[PreTrainedModel]:
    model_type = name.partition(":")[0]
    chosen = CLASSES.get(model_type)
    if name in VARIANTS and VARIANTS[name].model_class:
        chosen = VARIANTS[name].model_class
    if chosen is not None:
        return _class_named(chosen, model_type)
    for task in TASKS:
        found = getattr(modeling_auto, f"{task}_MAPPING_NAMES").get(model_type)
        if found is not None:
            return _class_named(found if isinstance(found, str) else found[0], model_type)
    return _last_model_class(model_type)


def _class_named(class_name: str, model_type: str) -> type[PreTrainedModel]:
    home = transformers if hasattr(transformers, class_name) else _modeling_module(model_type)
    found: type[PreTrainedModel] = getattr(home, class_name)
    return found


def _last_model_class(model_type: str) -> type[PreTrainedModel]:
    """The last model class that its module defines for the architecture's config."""
    module, config = _modeling_module(model_type), config_class(model_type)
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and value.config_class is config
        and "forward" in vars(value)
    ]
    if not classes:
        raise LookupError(f"no model class for {model_type!r} in {module.__name__}")
    return classes[-1]


def _modeling_module(model_type: str) -> ModuleType:
    of_config = config_class(model_type).__module__
    return importlib.import_module(of_config.replace("configuration_", "modeling_"))
