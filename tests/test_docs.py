"""The documentation is true: rendered from the code, and its snippets run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

import fxslim
from fxslim.backend import dynamo_backend
from tests.models import Attention, Residual, example
from tests.zoo.build import build

ROOT = Path(__file__).parent.parent


def test_the_operator_table_is_current():
    render = runpy.run_path(str(ROOT / "docs" / "render.py"))["render"]
    page = (ROOT / "docs" / "operators.md").read_text()
    assert page == render(), "run `python docs/render.py`"


def snippets(page: str = "README.md") -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:fxslim.capture")
def test_the_readme_runs():
    model, example_inputs = build("bert", "sdpa")
    names = {"model": model, "example_inputs": example_inputs, "batches": [example_inputs] * 3}
    for snippet in (*snippets(), *snippets("docs/criteria.md")):
        exec(compile(snippet, "README.md", "exec"), names)
    removed = [4 - len(kept) for kept in names["plan"].kept.values()]
    assert sum(removed) == 4
    assert sum(p.numel() for p in names["slim"].parameters()) < sum(
        p.numel() for p in model.parameters()
    )
    with torch.no_grad():
        names["slim"](**example_inputs)


@pytest.mark.filterwarnings("ignore:fxslim.capture")
def test_the_page_on_plans_runs():
    model, example_inputs = build("bert", "sdpa")
    names = {"fxslim": fxslim, "model": model, "example_inputs": example_inputs}
    for snippet in snippets("docs/plans.md"):
        exec(compile(snippet, "plans.md", "exec"), names)
    assert len(names["edited"].kept[names["first"]]) == 1
    assert names["edited"].reached["flops"] < 1
    assert names["channels"].sparsity == 0.5
    assert names["both"].reached["flops"] <= 0.8
    with torch.no_grad():
        names["slim"](**example_inputs)


@pytest.mark.filterwarnings("ignore")  # Inductor's, onnxscript's and torchao's own
def test_the_page_on_compilers_runs(tmp_path):
    torch.compiler.reset()
    if "fxslim" not in torch._dynamo.list_backends():  # not installed anew since it is there
        torch._dynamo.register_backend(dynamo_backend, name="fxslim")
    model = Residual(a=Attention(), b=Attention()).eval().requires_grad_(False)
    example_inputs = {"x": example()}
    names = {"fxslim": fxslim, "torch": torch, "model": model, "folder": tmp_path}
    names |= {"example_inputs": example_inputs, "batches": [example_inputs] * 3}
    expected = None
    for snippet in snippets("docs/compile.md"):
        exec(compile(snippet, "compile.md", "exec"), names)
        if "plan" in names and expected is None:
            expected = fxslim.narrow(names["program"], names["plan"])(**example_inputs)
    for result in ("fast", "narrow", "slim", "loaded"):
        torch.testing.assert_close(names[result](**example_inputs), expected, msg=result)
    assert (tmp_path / "slim.onnx").exists()
    difference = names["small"](**example_inputs) - expected
    assert 0 < difference.norm() / expected.norm() < 0.03


class Batches(torch.utils.data.Dataset):
    """One labelled example after the other, from a batch."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(next(iter(self.batch.values())))

    def __getitem__(self, number):
        return {name: values[number] for name, values in self.batch.items()}


@pytest.mark.filterwarnings("ignore:fxslim.capture", "ignore:.*pin_memory")
@pytest.mark.filterwarnings("ignore:fxslim.model_slim")  # gates do not close in eight steps
def test_the_page_on_training_runs(tmp_path):
    models = [build("bert")[0] for _ in range(3)]
    _, inputs = build("bert")
    batch = {**inputs, "labels": inputs["input_ids"]}
    args = TrainingArguments(
        str(tmp_path),
        max_steps=8,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    names = {
        "torch": torch,
        "model": models[0],
        "fresh_model": models[1],
        "other_model": models[2],
        "optimizer": torch.optim.AdamW(models[0].parameters(), lr=1e-3),
        "batches": [batch] * 8,
        "dataset": Batches(batch),
        "args": args,
    }
    slims = []
    for snippet in snippets("docs/training.md"):
        exec(compile(snippet, "training.md", "exec"), names)
        slims.append(names["slim"])
    removed = [sum(4 - len(k) for k in slim.meta["fxslim"].plan.kept.values()) for slim in slims]
    assert removed[:2] == [4, 4]
    assert names["gates"].plan().kept == slims[2].meta["fxslim"].plan.kept
    for model, slim in zip(models, slims, strict=True):
        with torch.no_grad():
            expected = model.eval()(**inputs).logits
            torch.testing.assert_close(slim(**inputs).logits, expected)
