"""What fxslim raises: one family, each member saying what was given, where, why, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = [
    "CaptureError",
    "CheckpointError",
    "FxslimError",
    "PlanError",
    "UnsupportedSite",
    "VerificationError",
    "check_choice",
]


class FxslimError(Exception):
    """The base of every error that fxslim raises on purpose."""


class CaptureError(FxslimError):
    """The model could not be captured as a graph; quotes what PyTorch said and what to try."""


class UnsupportedSite(FxslimError):
    """An attention that the user asked for cannot be pruned; carries the reason of the site."""


class PlanError(FxslimError):
    """A plan does not fit the sites: unknown names, heads that do not exist, units cut apart."""


class VerificationError(FxslimError):
    """The slim program disagrees with the masked one, or its shapes with the axis map."""


class CheckpointError(FxslimError):
    """A saved slim model or plan cannot be read back, or does not belong to this model."""


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuse an argument that is none of the names it may be.

    Raises:
        ValueError: names the argument, quotes what was given and lists what is known.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
