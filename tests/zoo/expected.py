"""What is known of the architectures: those of which no attention can lose heads, and why."""

from __future__ import annotations

__all__ = ["NOT_PRUNABLE"]

_FLAT_NORM = "queries and keys are normalised over all heads together"

NOT_PRUNABLE: dict[str, str] = {
    "bridgetower_vision_model": "its heads are 64 wide, so the tiny model has one",
    "deberta:talking_head": "the scores of the heads are mixed",
    "flex_olmo": _FLAT_NORM,
    "kosmos_2_text_model": "the context is normalised over all heads before the projection",
    "mobilevitv2": "separable attention: there is no product of queries and keys",
    "olmo2": _FLAT_NORM,
    "olmo3": _FLAT_NORM,
    "olmo_hybrid": _FLAT_NORM,
}
