"""What is known of the architectures: those of which no attention can lose heads, and why."""

from __future__ import annotations

__all__ = ["NOT_PRUNABLE"]

_FLAT_NORM = "queries and keys are normalised over all heads together"

_CONTEXT_NORM = "the context is normalised over all heads before the projection"

NOT_PRUNABLE: dict[str, str] = {
    "bitnet": _CONTEXT_NORM,
    "bridgetower_vision_model": "its heads are 64 wide, so the tiny model has one",
    "deberta:talking_head": "the scores of the heads are mixed",
    "esmc": _FLAT_NORM,
    "flex_olmo": _FLAT_NORM,
    "jetmoe": "each token's queries and outputs come from the experts it is routed to",
    "kosmos_2_text_model": _CONTEXT_NORM,
    "minimax_m2": _FLAT_NORM,
    "minimax_m3_vl_vision": "the sequences of a batch are as long as the data says",
    "mobilevitv2": "separable attention: there is no product of queries and keys",
    "olmo2": _FLAT_NORM,
    "olmo3": _FLAT_NORM,
    "olmo_hybrid": _FLAT_NORM,
    "olmoe": _FLAT_NORM,
    "qwen4_exp_text": "its layers are gated delta rules: no scores are normalised",
}
