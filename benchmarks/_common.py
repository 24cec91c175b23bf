"""What the benchmarks share: where they ran, models built from a config, tables and JSON files."""

from __future__ import annotations

import json
import platform
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Device = Annotated[str, typer.Option(help="Where the models run: cpu, cuda, cuda:1, …")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")]

console = Console()

# torch.export copies pytree specs with copyreg, which trips over torch's own deprecation.
warnings.filterwarnings("ignore", ".isinstance.treespec", FutureWarning)


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to know about where figures come from."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def build_encoder(layers: int, device: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A BERT-base of so many layers with random weights, in eval mode."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model: torch.nn.Module = BertModel(BertConfig(num_hidden_layers=layers))
    return model.to(device, dtype).eval()


def token_inputs(batch: int, sequence: int, device: str) -> dict[str, torch.Tensor]:
    """Token ids and a mask that pads the second half of the last row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (batch, sequence), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, sequence // 2 :] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def publish(
    title: str, rows: Sequence[dict[str, str]], result: dict[str, Any], path: Path | None
) -> None:
    """Print the rows as a table, and write the figures behind them as JSON if asked to."""
    table = Table(title=title, box=SIMPLE_HEAD)
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"wrote {path}")
