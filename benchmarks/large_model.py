"""Planning a model that does not fit into memory: Llama-3-70B's sizes, on the meta device.

There are no weights to score, so the plan's scores are random; everything else is what would be
done with the real ones: capture, find the attentions, plan, narrow.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
import typer
from _common import Json, console, environment, publish
from torch import nn

import fxslim


def build_decoder(layers: int) -> nn.Module:
    """A Llama of the sizes of Llama-3-70B with so many layers, without memory for its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(config).eval()
    return model


def peak_memory() -> int:
    """Bytes that this process held at most, imports included."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def step(rows: list[dict[str, str]], figures: dict[str, float], name: str) -> Iterator[None]:
    """Note the time that the block takes, and the peak of memory by its end."""
    start = time.perf_counter()
    with console.status(name):
        yield
    figures[name] = time.perf_counter() - start
    memory = f"{peak_memory() / 2**30:.2f}"
    rows.append({"step": name, "s": f"{figures[name]:.1f}", "peak so far, GiB": memory})


def parameters(module: nn.Module) -> int:
    """Numbers in all parameters; a tied one counts once."""
    return sum(p.numel() for p in module.parameters())


def main(
    json: Json = None,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 80,
    sparsity: Annotated[float, typer.Option(help="Share of the heads removed.")] = 0.5,
) -> None:
    """Time each step and show the peak of memory by its end."""
    model = build_decoder(layers)
    ids = torch.ones(2, 16, dtype=torch.long, device="meta")
    rows: list[dict[str, str]] = []
    figures: dict[str, float] = {}
    start = time.perf_counter()
    with step(rows, figures, "capture"):
        program = fxslim.capture(model, {"input_ids": ids})
    with step(rows, figures, "find"):
        sites = fxslim.find_attention(program)
    with step(rows, figures, "plan"):
        scores = {site.name: torch.rand(site.num_heads) for site in sites}
        plan = fxslim.plan(scores, sites, sparsity, scope="uniform")
    with step(rows, figures, "narrow"):
        slim = fxslim.narrow(program, plan)
    figures |= {"total": time.perf_counter() - start, "peak_bytes": peak_memory()}
    heads = [sum(map(len, plan.kept.values())), sum(site.num_heads for site in sites)]
    publish(
        f"{parameters(model) / 1e9:.1f}B parameters, {len(sites)} attentions: {heads[1]} heads → "
        f"{heads[0]}, {parameters(slim) / 1e9:.1f}B parameters; {figures['total']:.0f} s in all",
        rows,
        {"environment": environment("cpu"), "layers": layers, **figures},
        json,
    )


if __name__ == "__main__":
    typer.run(main)
