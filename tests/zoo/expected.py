"""What is known of the architectures: those of which no attention can lose heads, and why."""

from __future__ import annotations

__all__ = ["NOT_PRUNABLE"]

NOT_PRUNABLE: dict[str, str] = {}
