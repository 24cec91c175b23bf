"""Progress bars for what takes a while: on standard error, and only where that is a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

__all__ = ["tracked"]

T = TypeVar("T")


def tracked(items: Iterable[T], what: str) -> Iterable[T]:
    """The items, with a bar that says `what` and goes away at the end."""
    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)
