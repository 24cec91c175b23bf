"""What others make of a slim encoder: torch.compile's backend, AOTInductor, ONNX Runtime, torchao.

Every client gets the dense model and the slim one, captured alike; calls take turns.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _common import Device, Json, build_encoder, environment, publish, quartiles, token_inputs
from torch import nn
from torch.export import Dim

import fxslim
from fxslim.measure import bind, count_flops, interleave

Inputs = dict[str, torch.Tensor]
Call = Callable[[], Any]


class Client(StrEnum):
    """Who runs the models."""

    compile = "torch.compile"
    aot_inductor = "AOTInductor"
    onnx_runtime = "ONNX Runtime"
    int8_weights = "torchao int8 weights"
    int8_dynamic = "torchao int8 dynamic"


def dynamic(inputs: Inputs) -> dict[str, dict[int, Any]]:
    """Batch and sequence of every input are dynamic."""
    return {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}


def with_torch_compile(dense: nn.Module, slim: nn.Module, inputs: Inputs) -> tuple[Call, Call]:
    """The dense model compiled with Inductor, and with fxslim before Inductor."""
    plan = fxslim.Report.of(slim).plan
    with_plan = fxslim.backend(plan=plan)
    first, second = (torch.compile(dense, backend=b) for b in ("inductor", with_plan))
    return bind(first, inputs), bind(second, inputs)


def with_aot_inductor(program: nn.Module, inputs: Inputs, folder: Path) -> Call:
    """A package that AOTInductor compiled, loaded again."""
    exported = torch.export.export(program, (), inputs, dynamic_shapes=dynamic(inputs))
    path = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(folder / "model.pt2")
    )
    return bind(torch._inductor.aoti_load_package(path), inputs)


def with_onnx_runtime(program: nn.Module, inputs: Inputs, folder: Path) -> Call:
    """A session of ONNX Runtime on the exported file."""
    import onnxruntime

    file = folder / "model.onnx"
    torch.onnx.export(
        program, (), file, kwargs=inputs, dynamic_shapes=dynamic(inputs), verbose=False
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others wait, too
    session = onnxruntime.InferenceSession(file, options)
    feed = {name: tensor.cpu().numpy() for name, tensor in inputs.items()}
    return lambda: session.run(None, feed)


def quantized(program: nn.Module, inputs: Inputs, config: Any) -> Call:
    """The model with the weights of its linear layers in int8."""
    from torchao.quantization import quantize_

    model = copy.deepcopy(fxslim.linear_modules(program))
    quantize_(model, config)
    return bind(torch.compile(model, dynamic=False), inputs)


def calls_of(
    client: Client, dense: nn.Module, slim: nn.Module, inputs: Inputs, folder: Path
) -> dict[str, Call]:
    """What to time: the dense model and the slim one, run by `client`."""
    if client is Client.compile:
        return dict(zip(("dense", "slim"), with_torch_compile(dense, slim, inputs), strict=True))
    from torchao import quantization

    make = {
        Client.aot_inductor: lambda model, to: with_aot_inductor(model, inputs, to),
        Client.onnx_runtime: lambda model, to: with_onnx_runtime(model, inputs, to),
        Client.int8_weights: lambda model, _: quantized(
            model, inputs, quantization.Int8WeightOnlyConfig()
        ),
        Client.int8_dynamic: lambda model, _: quantized(
            model, inputs, quantization.Int8DynamicActivationInt8WeightConfig()
        ),
    }[client]
    program = fxslim.capture(dense, inputs)
    calls = {}
    for name, model in {"dense": program, "slim": slim}.items():
        (folder / name).mkdir()
        calls[name] = make(model, folder / name)
    return calls


def measure(
    client: Client, dense: nn.Module, slim: nn.Module, inputs: Inputs, repeats: int
) -> dict[str, Any]:
    """Medians, the ratios of calls in the same round, and the sizes of what was written."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        seconds = interleave(calls_of(client, dense, slim, inputs, Path(folder)), repeats)
        sizes = {
            name: sum(f.stat().st_size for f in (Path(folder) / name).rglob("*") if f.is_file())
            for name in ("dense", "slim")
        }
    ratios = [a / b for a, b in zip(seconds["dense"], seconds["slim"], strict=True)]
    return {
        "client": client.value,
        "milliseconds": {name: 1e3 * quartiles(s)[1] for name, s in seconds.items()},
        "dense_over_slim": quartiles(ratios),
        "bytes": sizes,
    }


def render(figures: dict[str, Any]) -> dict[str, str]:
    """One row of the table; after ±, half of the distance between the quartiles."""
    low, middle, high = figures["dense_over_slim"]
    megabytes = [figures["bytes"][name] / 1e6 for name in ("dense", "slim")]
    return {
        "client": figures["client"],
        **{f"{name}, ms": f"{ms:.1f}" for name, ms in figures["milliseconds"].items()},
        "dense / slim": f"{middle:.2f} ± {(high - low) / 2:.2f}",
        "files, MB": " → ".join(f"{size:.0f}" for size in megabytes) if all(megabytes) else "",
    }


CLIENTS = list(Client)


def main(
    device: Device = "cpu",
    json: Json = None,
    sparsity: Annotated[float, typer.Option(help="Share of the heads removed.")] = 0.5,
    layers: int = 4,
    batch: int = 4,
    sequence: int = 128,
    repeats: Annotated[int, typer.Option(help="Rounds; each times every model once.")] = 15,
    client: Annotated[list[Client], typer.Option()] = CLIENTS,
) -> None:
    """Time the dense encoder and the slim one under each client; print medians and ratios."""
    warnings.filterwarnings("ignore", module="torchao|onnxscript|copyreg")
    inputs = token_inputs(batch, sequence, device)
    dense = build_encoder(layers, device)
    slim = fxslim.compile(dense, sparsity, inputs)
    results = [measure(kind, dense, slim, inputs, repeats) for kind in client]
    flops = {n: count_flops(bind(m, inputs)) for n, m in {"dense": dense, "slim": slim}.items()}
    shape = {"layers": layers, "batch": batch, "sequence": sequence, "sparsity": sparsity}
    publish(
        f"{layers} layers, {batch} × {sequence} tokens; dense / slim by FLOPs: "
        f"{flops['dense'] / flops['slim']:.2f}",
        [render(figures) for figures in results],
        {"environment": environment(device), **shape, "repeats": repeats, "results": results},
        json,
    )


if __name__ == "__main__":
    typer.run(main)
