"""What other tools make of a slim program: AOTInductor, saved exports, ONNX Runtime."""

import math
import shutil

import pytest
import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

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


def weights_in(file):
    """How many numbers an ONNX file holds."""
    import onnx

    return sum(math.prod(tensor.dims) for tensor in onnx.load(file).graph.initializer)


ONNX_MODELS = ["attention", *(pytest.param(n, marks=pytest.mark.zoo) for n in ("bert", "llama"))]


@torch.no_grad()
@pytest.mark.parametrize("name", ONNX_MODELS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # onnxscript's
def test_onnx_runtime(name, tmp_path):
    import onnxruntime

    if name == "attention":
        model, inputs = Residual(a=Attention(), b=Attention()).eval(), {"x": example()}
        resized = [{"x": example(*size)} for size in SIZES]
    else:
        model, inputs = build(name, "sdpa")
        tokens = [torch.randint(0, 100, size) for size in SIZES]
        resized = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens]
    slim = fxslim.compile(model, 0.5, inputs)
    lengths = {key: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for key in inputs}
    files = {label: tmp_path / f"{label}.onnx" for label in ("dense", "slim")}
    for program, file in zip((fxslim.capture(model, inputs), slim), files.values(), strict=True):
        torch.onnx.export(
            program, (), file, kwargs=inputs, dynamic_shapes=lengths, dynamo=True, verbose=False
        )
    assert weights_in(files["slim"]) < weights_in(files["dense"])
    session = onnxruntime.InferenceSession(files["slim"])
    for given in resized:
        (got, *_) = session.run(None, {key: value.numpy() for key, value in given.items()})
        (expected, *_) = pytree.tree_leaves(slim(**given))
        torch.testing.assert_close(torch.from_numpy(got), expected)
