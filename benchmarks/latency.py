"""Latency of a slim encoder against one built that narrow by hand, and against the dense one.

The narrow one is a dense model whose projections were replaced by smaller ones, which is what a
person would write who knew the sizes beforehand. It carries the slim weights, and its outputs
are compared with the slim model's before anything is timed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from _common import Device, Json, build_encoder, environment, publish, quartiles, token_inputs
from torch import nn

import fxslim
from fxslim.measure import bind, count_flops, interleave


class Mode(StrEnum):
    """How the models run."""

    eager = "eager"
    compile = "compile"


class Precision(StrEnum):
    """The type of weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"


MODES, PRECISIONS, FFN_SPARSITIES = list(Mode), list(Precision), [0.0, 0.5]


def build_narrow(dense: nn.Module, slim: nn.Module) -> nn.Module:
    """The dense model's own class with projections of the slim model's sizes and weights."""
    state = slim.state_dict()
    narrow = copy.deepcopy(dense)
    for name, linear in list(narrow.named_modules()):
        if isinstance(linear, nn.Linear):
            linear.out_features, linear.in_features = state[f"{name}.weight"].shape
            linear.weight = nn.Parameter(torch.empty_like(state[f"{name}.weight"]))
            linear.bias = nn.Parameter(torch.empty_like(state[f"{name}.bias"]))
    for attention in narrow.modules():
        if hasattr(attention, "num_attention_heads"):
            attention.all_head_size = attention.query.out_features
            attention.num_attention_heads = attention.all_head_size // attention.attention_head_size
    missing = narrow.load_state_dict(state, strict=False).missing_keys
    assert not missing, f"the slim model has no {missing}"
    return narrow


def measure(
    models: dict[str, nn.Module], inputs: dict[str, torch.Tensor], mode: Mode, repeats: int
) -> dict[str, list[float]]:
    """Seconds of every model in every round."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        run = torch.compile(model, dynamic=False) if mode is Mode.compile else model
        calls[name] = bind(run, inputs)
    return interleave(calls, repeats)


def summarize(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and quartiles of the ratios of calls in the same round."""

    def ratio(over: str, under: str) -> tuple[float, float, float]:
        return quartiles([a / b for a, b in zip(seconds[over], seconds[under], strict=True)])

    return {
        "milliseconds": {name: 1e3 * quartiles(s)[1] for name, s in seconds.items()},
        "slim_over_narrow": ratio("slim", "narrow"),
        "dense_over_slim": ratio("dense", "slim"),
    }


def render(setting: dict[str, str], figures: dict[str, Any]) -> dict[str, str]:
    """One row of the table; after ±, half of the distance between the quartiles."""
    times = {f"{name}, ms": f"{ms:.1f}" for name, ms in figures["milliseconds"].items()}
    ratios = {}
    for name in ("slim_over_narrow", "dense_over_slim"):
        low, middle, high = figures[name]
        ratios[name.replace("_over_", " / ")] = f"{middle:.2f} ± {(high - low) / 2:.2f}"
    return {"model": " ".join(setting.values()), **times, **ratios}


def prepare(
    dense: nn.Module, sparsity: float, ffn_sparsity: float, inputs: dict[str, torch.Tensor]
) -> dict[str, nn.Module]:
    """The three models; slim and narrow compute the same."""
    slim = fxslim.compile(dense, sparsity, inputs, ffn_sparsity=ffn_sparsity, rounding=32)
    narrow = build_narrow(dense, slim)
    with torch.no_grad():
        expected, actual = narrow(**inputs)[0], slim(**inputs)[0]
    rounding = 4e-2 if expected.dtype.itemsize < 4 else 1e-4
    torch.testing.assert_close(actual, expected, atol=rounding, rtol=0)
    return {"dense": dense, "narrow": narrow, "slim": slim}


def main(
    device: Device = "cpu",
    json: Json = None,
    sparsity: Annotated[float, typer.Option(help="Share of the heads removed.")] = 0.5,
    ffn_sparsity: Annotated[
        list[float], typer.Option(help="Share of the channels removed; may be repeated.")
    ] = FFN_SPARSITIES,
    layers: int = 12,
    batch: int = 4,
    sequence: int = 128,
    repeats: Annotated[int, typer.Option(help="Rounds; each times every model once.")] = 15,
    mode: Annotated[list[Mode], typer.Option()] = MODES,
    precision: Annotated[list[Precision], typer.Option()] = PRECISIONS,
) -> None:
    """Time dense, narrow by hand, and slim, in turn; print medians and ratios."""
    inputs = token_inputs(batch, sequence, device)
    rows, results, by_flops = [], [], {}
    for kind, share in itertools.product(precision, ffn_sparsity):
        dense = build_encoder(layers, device, getattr(torch, kind.value))
        models = prepare(dense, sparsity, share, inputs)
        flops = {name: count_flops(bind(model, inputs)) for name, model in models.items()}
        pruned = "heads + ffn" if share else "heads"
        by_flops[pruned] = f"{flops['dense'] / flops['slim']:.2f}"
        for way in mode:
            figures = summarize(measure(models, inputs, way, repeats))
            setting = {"pruned": pruned, "dtype": kind.value, "mode": way.value}
            rows.append(render(setting, figures))
            results.append({**setting, **figures, "flops": flops})
            torch.compiler.reset()
    shape = {"layers": layers, "batch": batch, "sequence": sequence, "sparsity": sparsity}
    said = "; ".join(f"{ratio} ({pruned})" for pruned, ratio in by_flops.items())
    publish(
        f"{layers} layers, {batch} × {sequence} tokens; dense / slim by FLOPs: {said}",
        rows,
        {"environment": environment(device), **shape, "repeats": repeats, "results": results},
        json,
    )


if __name__ == "__main__":
    typer.run(main)
