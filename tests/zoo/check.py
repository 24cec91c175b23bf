"""Check one entry: capture, find attentions, halve the heads, compare with the dense model."""

from __future__ import annotations

import re
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import fx, nn

import fxslim
from tests.zoo.cores import count_cores
from tests.zoo.entries import load
from tests.zoo.reference import (
    NO_DIFFERENCE,
    TOLERANCE,
    Call,
    Difference,
    call_of,
    compare,
    dense_of,
    without_heads,
)
from tests.zoo.resizing import resized

__all__ = ["FAILURES", "SPARSITY", "Result", "check"]

SPARSITY = 0.5

FAILURES = ("wrong", "error", "crash", "timeout")
"""The statuses that are the library's fault, whatever the model."""

_NO_RULE = re.compile(r"(\S+) has no rule|the rule of (\S+)")


@dataclass
class Result:
    """What came out of checking an entry.

    Attributes:
        name: The entry.
        attn: "sdpa", "eager", or "own" for the attention that the model comes with.
        status: "equal"; "wrong": the slim model differs from the dense one without those heads;
            "refused": no attention can be pruned; "capture": the model could not be captured;
            "error": `compile` failed though attentions can be pruned; "skipped": this combination
            does not exist, or needs a library that is not installed; "crash" and "timeout": of the
            worker process.
        cores: Attention cores counted without the library, see `cores.py`.
        sites: Attentions found.
        prunable: How many of them can lose heads.
        reasons: Why the others cannot, and how many each reason holds back.
        operators: Operators without a fitting rule, by how many sites they hold back.
        difference: The largest between slim and dense.
        effect: How much the removed heads changed the dense model: what the check could see.
        shapes: Which inputs were compared: "example", "batch", "length".
        seconds: Of the whole check.
        detail: The message of an error, or what was compared if it is not the eager model.
    """

    name: str
    attn: str
    status: str = "error"
    cores: int = 0
    sites: int = 0
    prunable: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    difference: Difference = NO_DIFFERENCE
    effect: float = 0.0
    shapes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    detail: str = ""


def check(name: str, attn: str) -> Result:
    """Check an entry in this process.

    Args:
        name: One of `entries.entry_names`.
        attn: "sdpa", "eager" or "own".
    """
    start = time.perf_counter()
    result = Result(name, attn)
    try:
        _run(result)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the result
        result.status = "error"
        result.detail = f"{_message(error)}\n{_where(error)}"
    result.seconds = time.perf_counter() - start
    return result


def _run(result: Result) -> None:
    try:
        model, inputs = load(result.name, None if result.attn == "own" else result.attn)
    except (ImportError, ValueError) as error:
        if isinstance(error, ValueError) and "attention implementation" not in str(error):
            raise
        result.status, result.detail = "skipped", _message(error)
        return
    try:
        program = fxslim.capture(model, inputs)
    except fxslim.CaptureError as error:
        result.status, result.detail = "capture", _message(error)
        return
    result.cores = count_cores(program.graph)
    _record(result, fxslim.find_attention(program))
    if not result.prunable:
        result.status = "refused"
        return
    slim = fxslim.compile(program, SPARSITY, verify=False)
    _compare(result, model, program, slim, call_of(inputs))


def _record(result: Result, sites: Sequence[fxslim.AttentionSite]) -> None:
    refused = [site for site in sites if not site.prunable]
    result.sites, result.prunable = len(sites), len(sites) - len(refused)
    result.reasons = dict(Counter(site.reason for site in refused))
    matches = [_NO_RULE.search(site.reason) for site in refused]
    result.operators = dict(Counter(m[1] or m[2] for m in matches if m is not None))


def _compare(
    result: Result, model: nn.Module, program: fx.GraphModule, slim: fx.GraphModule, call: Call
) -> None:
    done: Any = slim.meta["fxslim"]
    dense = dense_of(program, model, call)
    if dense is program:
        result.detail = "compared with the captured program, which differs from the eager model"
    reference = without_heads(dense, done.sites, done.plan.kept)
    masked = call.on(reference)
    result.effect = compare(masked, call.on(dense)).relative
    result.difference = compare(call.on(slim), masked)
    result.shapes = ["example"]
    for label, other in resized(program, call).items():
        if _accepts(program, other) and _accepts(reference, other):
            result.difference |= compare(other.on(slim), other.on(reference))
            result.shapes.append(label)
    result.status = "equal" if result.difference.relative <= TOLERANCE else "wrong"


def _accepts(model: nn.Module, call: Call) -> bool:
    """Whether the model takes inputs of these sizes at all."""
    try:
        call.on(model)
    except Exception:  # noqa: BLE001 - guards and shape errors come in many classes
        return False
    return True


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _where(error: BaseException) -> str:
    """The innermost calls of this project, the last one first."""
    calls = traceback.extract_tb(error.__traceback__)
    frames = [call for call in calls if "site-packages" not in call.filename][:-4:-1]
    return "\n".join(f"at {Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)
