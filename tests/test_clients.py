"""What other tools make of a slim program: AOTInductor, saved exports, ONNX Runtime."""

import shutil

import pytest
import torch
from torch.export import Dim

import fxslim
from tests.models import Attention, Residual, example
from tests.zoo import build

SIZES = [(3, 5), (2, 7), (1, 4), (4, 1)]

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="AOTInductor needs a C++ compiler"
)


def exported(slim):
    sizes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    return torch.export.export(slim, (example(),), dynamic_shapes=sizes)


@pytest.fixture
def slim():
    return fxslim.compile(Residual(a=Attention()).eval(), 0.5, example())


@torch.no_grad()
def test_export_save_and_load(slim, tmp_path):
    torch.export.save(exported(slim), tmp_path / "slim.pt2")
    loaded = torch.export.load(tmp_path / "slim.pt2").module()
    for batch, length in SIZES:
        x = example(batch, length)
        torch.testing.assert_close(loaded(x), slim(x))
    assert loaded.state_dict().keys() == slim.state_dict().keys()


@needs_compiler
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # Inductor's own imports
def test_aot_inductor(slim, tmp_path):
    path = torch._inductor.aoti_compile_and_package(
        exported(slim), package_path=str(tmp_path / "slim.pt2")
    )
    packaged = torch._inductor.aoti_load_package(path)
    for batch, length in SIZES:
        x = example(batch, length)
        torch.testing.assert_close(packaged(x), slim(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.zoo)])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # onnxscript's
def test_onnx_runtime(name, tmp_path):
    import onnxruntime

    model, inputs = build(name, "sdpa")
    slim = fxslim.compile(model, 0.5, inputs)
    sizes = {key: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for key in inputs}
    files = {label: tmp_path / f"{label}.onnx" for label in ("dense", "slim")}
    for program, file in zip((fxslim.capture(model, inputs), slim), files.values(), strict=True):
        torch.onnx.export(
            program, (), file, kwargs=inputs, dynamic_shapes=sizes, dynamo=True, verbose=False
        )
    assert files["slim"].stat().st_size < files["dense"].stat().st_size
    session = onnxruntime.InferenceSession(files["slim"])
    for batch, length in ((3, 7), (1, 4), (5, 9)):
        ids = torch.randint(0, 100, (batch, length))
        feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        (got, *_) = session.run(None, {key: value.numpy() for key, value in feed.items()})
        torch.testing.assert_close(torch.from_numpy(got), slim(**feed)["logits"])
