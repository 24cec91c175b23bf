"""What pruning costs: processor time of each step after the capture, and memory, by depth.

Torch-Pruning does the same to the same models in the same run where it is installed: its graph
build plus its pruning of half of the heads. It is timed twice: as it comes, when it narrows the
other layers too, and told to ignore every layer outside the attentions, by hand and by name.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _common import Device, Json, build_encoder, console, environment, publish, token_inputs
from torch import nn

import fxslim

Inputs = dict[str, torch.Tensor]
Seconds = dict[str, float]

DEPTHS = [6, 12, 24, 48]

RIVALS = {"Torch-Pruning": False, "TP, attention only": True}
"""How Torch-Pruning is set up: whether all layers outside the attentions are ignored."""


@contextmanager
def clock(seconds: Seconds, name: str) -> Iterator[None]:
    """Note the processor time that the block takes, all threads together."""
    gc.collect()  # what others left behind is not this block's cost
    start = time.process_time()
    yield
    seconds[name] = time.process_time() - start


def run_fxslim(model: nn.Module, inputs: Inputs, sparsity: float) -> Seconds:
    """Processor seconds of the capture, of what `fxslim.compile` does after it, and of its steps.

    The steps add up to more than the whole: each one alone finds the attentions anew.
    """
    seconds: Seconds = {}
    with clock(seconds, "capture"):
        program = fxslim.capture(model, inputs)
    with clock(seconds, "after capture"):
        fxslim.compile(program, sparsity, criterion="magnitude")
    with clock(seconds, "find"):
        sites = fxslim.find_attention(program)
    with clock(seconds, "mask"):
        masked = fxslim.insert_head_masks(program, sites)
    with clock(seconds, "score"):
        scores = fxslim.score(masked, "magnitude")
    with clock(seconds, "plan"):
        plan = fxslim.plan(scores, sites, sparsity)
    with clock(seconds, "narrow"):
        slim = fxslim.narrow(program, plan)
    with clock(seconds, "verify"):
        fxslim.verify(slim, masked, plan)
    return seconds


def run_torch_pruning(
    model: nn.Module, inputs: Inputs, sparsity: float, *, attention_only: bool
) -> Seconds:
    """Processor seconds of Torch-Pruning's graph build and of its pruning; changes the model."""
    import torch_pruning

    attentions = [layer.attention.self for layer in model.encoder.layer]
    outside = [part for layer in model.encoder.layer for part in (layer.intermediate, layer.output)]
    heads = {p: a.num_attention_heads for a in attentions for p in (a.query, a.key, a.value)}
    ignored = [model.embeddings, model.pooler, *outside] if attention_only else [model.pooler]
    seconds: Seconds = {}
    with clock(seconds, "graph"):
        pruner = torch_pruning.pruner.BasePruner(
            model,
            inputs,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=sparsity,  # must not be 0, or no heads are pruned either
            head_pruning_ratio=sparsity,
            prune_num_heads=True,
            prune_head_dims=False,
            num_heads=dict(heads),
            ignored_layers=ignored,
            output_transform=lambda output: output.pooler_output.sum(),
        )
    with clock(seconds, "prune"):
        pruner.step()
    left = (
        math.floor(heads[attentions[0].query] * (1 - sparsity)) * attentions[0].attention_head_size
    )
    widths = {attention.query.out_features for attention in attentions}
    assert widths == {left}, f"Torch-Pruning left widths {widths}, not {left}"
    return seconds


def peak_memory(call: Callable[[], object], device: str) -> int | None:
    """Bytes that the process held at most during the call, above what it held before."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide a peak
    reset.write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    value = next(line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(value.split()[1])


def parameter_bytes(module: nn.Module) -> int:
    """Memory of all parameters; a tied one counts once."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def measure_memory(
    model: nn.Module, inputs: Inputs, sparsity: float, device: str
) -> dict[str, Any]:
    """Peak of `fxslim.compile` above the dense model, beside the size of the slim parameters."""
    kept: list[nn.Module] = []
    peak = peak_memory(lambda: kept.append(fxslim.compile(model, sparsity, inputs)), device)
    return {"peak_bytes": peak, "slim_bytes": parameter_bytes(kept[0])}


def medians(runs: list[Seconds]) -> Seconds:
    """The median of every step."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def exponent(layers: list[int], seconds: list[float]) -> float | None:
    """The power of the depth that the times grow with, by least squares of the logarithms."""
    if len(set(layers)) < 2:
        return None
    logs = [[math.log(value) for value in values] for values in (layers, seconds)]
    return statistics.linear_regression(*logs).slope


def measure(
    layers: int, inputs: Inputs, sparsity: float, repeats: int, device: str
) -> dict[str, Any]:
    """All figures of one depth, fxslim and Torch-Pruning in turn."""
    model = build_encoder(layers, device)
    rival = importlib.util.find_spec("torch_pruning") is not None
    runs: dict[str, list[Seconds]] = {"fxslim": [], **{name: [] for name in RIVALS}}
    for _ in range(repeats):
        runs["fxslim"].append(run_fxslim(model, inputs, sparsity))
        for name, attention_only in RIVALS.items() if rival else ():
            victim = copy.deepcopy(model)
            runs[name].append(
                run_torch_pruning(victim, inputs, sparsity, attention_only=attention_only)
            )
            del victim
    figures: dict[str, Any] = {name: medians(run) for name, run in runs.items() if run}
    figures |= measure_memory(model, inputs, sparsity, device)
    return {"layers": layers, **figures}


def render(figures: dict[str, Any]) -> dict[str, str]:
    """One column of the table."""
    capture, after, *steps = figures["fxslim"].items()
    shown = {f"{name}, s": f"{value:.2f}" for name, value in (capture, after)}
    shown["  / capture"] = f"{after[1] / capture[1]:.2f}"
    shown |= {f"  {name} alone, s": f"{value:.2f}" for name, value in steps}
    for name in RIVALS:
        if rival := figures.get(name):
            total = sum(rival.values())
            shown[f"{name}, s"] = f"{total:.2f}"
            shown[f"  after capture / {name}"] = f"{after[1] / total:.2f}"
    if figures["peak_bytes"] is not None:
        shown["peak above dense, MB"] = f"{figures['peak_bytes'] / 1e6:.0f}"
        shown["  / slim parameters"] = f"{figures['peak_bytes'] / figures['slim_bytes']:.2f}"
    return shown


def transpose(columns: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """Rows of a table whose columns are given, each with the same keys."""
    keys = next(iter(columns.values()))
    return [{"layers": key} | {name: c[key] for name, c in columns.items()} for key in keys]


def main(
    device: Device = "cpu",
    json: Json = None,
    layers: Annotated[list[int], typer.Option(help="A depth; may be repeated.")] = DEPTHS,
    sparsity: Annotated[float, typer.Option(help="Share of the heads removed.")] = 0.5,
    repeats: Annotated[int, typer.Option(help="Runs of each; medians are shown.")] = 3,
    threads: Annotated[int, typer.Option(help="With one, no time goes into waiting threads.")] = 1,
) -> None:
    """Time capture, the steps after it, and Torch-Pruning, by depth; fit the growth."""
    torch.set_num_threads(threads)
    inputs = token_inputs(2, 16, device)
    measure(1, inputs, sparsity, 1, device)  # imports and first calls are nobody's cost
    results = []
    for depth in layers:
        with console.status(f"{depth} layers"):
            results.append(measure(depth, inputs, sparsity, repeats, device))
    growth = exponent(layers, [figures["fxslim"]["after capture"] for figures in results])
    fitted = f"; after capture grows as depth^{growth:.2f}" if growth is not None else ""
    publish(
        f"processor time, medians of {repeats}{fitted}",
        transpose({str(figures["layers"]): render(figures) for figures in results}),
        {"environment": environment(device), "exponent": growth, "results": results},
        json,
    )


if __name__ == "__main__":
    typer.run(main)
