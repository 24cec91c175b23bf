"""Tiny configs: every size-like field of a transformers config, and of its parts, made small."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from tests.zoo.fields import HEADS, WIDTH, Defaults, tiny_value
from tests.zoo.overrides import DROP, OVERRIDES, SUB_CONFIG_TYPES, VARIANTS

__all__ = ["config_class", "tiny_config"]

Kwargs = dict[str, Any]
ConfigClass = type[PreTrainedConfig]

_COMMON_FIELDS = {f.name for f in dataclasses.fields(PreTrainedConfig)}
_TIMM_TYPES = ("timm_backbone", "timm_wrapper")


@functools.cache
def config_class(model_type: str) -> ConfigClass:
    """The config class of an architecture.

    >>> config_class("bert").__name__
    'BertConfig'
    """
    found: ConfigClass = CONFIG_MAPPING[model_type]
    return found


def tiny_config(name: str) -> PreTrainedConfig:
    """A config of a tiny model: four heads of 16, two layers, 128 words.

    Args:
        name: An architecture of `types.txt`, or a variant such as ``"falcon:alibi"``.

    >>> tiny_config("gpt2").n_head, tiny_config("llama:mqa").num_key_value_heads
    (4, 1)
    """
    model_type = name.partition(":")[0]
    extra = VARIANTS[name].config if name in VARIANTS else {}
    cls = config_class(model_type)
    kwargs = _tiny_kwargs(cls, extra)
    return cls(**kwargs)


def _tiny_kwargs(cls: ConfigClass, extra: Mapping[str, Any]) -> Kwargs:
    fields = {f.name: _default(f) for f in dataclasses.fields(cls) if f.name not in _COMMON_FIELDS}
    defaults = Defaults.of(fields)
    kwargs = {
        name: value
        for name, default in fields.items()
        if (value := tiny_value(name, default, defaults)) is not default
    }
    overrides = _merged(OVERRIDES.get(cls.model_type, {}), extra)
    for name, sub_class in _sub_configs(cls, overrides).items():
        sub_kwargs = _tiny_kwargs(sub_class, overrides.pop(name, {}))
        kwargs[name] = {**sub_kwargs, "model_type": sub_class.model_type}
    kwargs = _merged(kwargs, overrides)
    if "rope_parameters" in fields and "rope_parameters" not in kwargs:
        kwargs |= _tiny_rope(cls, kwargs, fields)
    return {name: value for name, value in kwargs.items() if value is not DROP}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def _merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> Kwargs:
    """`values` updated with `over`, sub-configs merged; rope parameters are replaced whole."""
    merged = dict(values)
    for name, value in over.items():
        old = merged.get(name)
        if isinstance(value, dict) and isinstance(old, dict) and name != "rope_parameters":
            value = _merged(old, value)
        merged[name] = value
    return merged


def _sub_configs(cls: ConfigClass, overrides: Kwargs) -> dict[str, ConfigClass]:
    """The class of each sub-config; where the field takes any, the one of the default instance."""
    wanted = SUB_CONFIG_TYPES.get(cls.model_type, {})
    found = {}
    for name, declared in (cls.sub_configs or {}).items():
        if not isinstance(overrides.get(name, {}), dict):
            continue
        if name in wanted:
            found[name] = config_class(wanted[name])
        elif declared is not AutoConfig:
            found[name] = declared
        elif (default := getattr(cls(), name, None)) is not None:
            is_timm = default.model_type in _TIMM_TYPES
            found[name] = config_class("resnet") if is_timm else type(default)
    return found


def _tiny_rope(cls: ConfigClass, kwargs: Kwargs, fields: Kwargs) -> Kwargs:
    """Multimodal rotary sections that add up to the tiny head dim; nothing for other models."""
    rope = getattr(cls(), "rope_parameters", None)
    nested = isinstance(rope, dict) and rope and all(isinstance(v, dict) for v in rope.values())
    ignored = getattr(cls, "ignore_keys_at_rope_validation", None) or ()
    has_sections = isinstance(rope, dict) and "mrope_section" in rope
    if nested or not (has_sections or "mrope_section" in ignored):
        return {}
    rope = dict(rope) if isinstance(rope, dict) else {"rope_type": "default", "rope_theta": 1e4}
    per_head = kwargs.get("hidden_size", WIDTH) // kwargs.get("num_attention_heads", HEADS)
    head_dim = kwargs.get("head_dim") or fields.get("head_dim") or per_head
    half = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    count = len(rope.get("mrope_section", (1, 1, 1)))
    rope["mrope_section"] = [half - half // count * (count - 1)] + [half // count] * (count - 1)
    return {"rope_parameters": rope}
