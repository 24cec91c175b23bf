"""Every entry of the zoo by name, whatever it comes from."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.build import build, model_types
from tests.zoo.diffusers_models import DIFFUSERS
from tests.zoo.handwritten import HANDWRITTEN
from tests.zoo.overrides import VARIANTS

__all__ = ["entry_names", "has_implementations", "load"]

_FAMILIES = {"diffusers": DIFFUSERS, "handwritten": HANDWRITTEN}


def entry_names() -> tuple[str, ...]:
    """Architectures, their variants (``llama:mqa``), and ``handwritten/…`` and ``diffusers/…``.

    >>> {"bert", "llama:mqa", "handwritten/nanogpt"} <= set(entry_names())
    True
    """
    families = [f"{family}/{name}" for family, names in _FAMILIES.items() for name in names]
    return (*model_types(), *VARIANTS, *families)


def has_implementations(name: str) -> bool:
    """Whether the entry can be built with SDPA as well as with eager attention."""
    return "/" not in name


def load(
    name: str, attn_implementation: str | None = None
) -> tuple[nn.Module, tuple[Any, ...] | dict[str, Any]]:
    """The model of an entry and its example inputs.

    Args:
        name: One of `entry_names`.
        attn_implementation: For transformers: ``"sdpa"``, ``"eager"`` or None.

    Raises:
        KeyError: There is no such entry.
        ModuleNotFoundError: The entry needs a library that is not installed.
    """
    family, _, member = name.partition("/")
    if not member:
        return build(name, attn_implementation)
    if member not in _FAMILIES.get(family, {}):
        raise KeyError(f"no {name!r} in this zoo: `python -m tests.zoo --list` prints the names")
    return _FAMILIES[family][member]()
