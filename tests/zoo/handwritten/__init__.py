"""Tiny models that write attention in their own way, with what is true of each."""

from __future__ import annotations

from tests.zoo.handwritten import (
    arrangements,
    grouped,
    per_head,
    positions,
    projections,
    refused,
    torch_nn,
)
from tests.zoo.handwritten.common import Entry, Example

__all__ = ["HANDWRITTEN", "Entry", "Example"]

_FILES = (arrangements, grouped, per_head, positions, projections, refused, torch_nn)

HANDWRITTEN: dict[str, Entry] = {
    entry.name: entry
    for entry in sorted((e for f in _FILES for e in f.ENTRIES), key=lambda e: e.name)
}
"""Every hand-written model by name; calling an entry gives the model and its inputs."""
