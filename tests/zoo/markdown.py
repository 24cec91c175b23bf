"""The results of a run as a page of the docs: one row an entry, and why attentions are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
import transformers

from tests.zoo.check import Result
from tests.zoo.tables import kinds_of_reasons

__all__ = ["page"]


def page(results: Sequence[Result]) -> str:
    """`docs/zoo.md`, as ``python -m tests.zoo --markdown docs/zoo.md`` writes it."""
    done = [result for result in results if result.status != "skipped"]
    parts = [
        "# The zoo",
        _intro(done),
        _totals(done),
        "## Entry by entry",
        _table(("entry", "attention", "cores", "found", "prunable", "result"), _rows(done)),
        "## Why attentions are refused",
        _counts("reason", (kinds_of_reasons(result) for result in done)),
        "## Operators without a rule that hold attentions back",
        _counts("operator", (result.operators for result in done)) or "None.",
    ]
    return "\n\n".join(parts) + "\n"


def _intro(results: Sequence[Result]) -> str:
    models = len({result.name for result in results})
    return (
        f"Written by `python -m tests.zoo --markdown docs/zoo.md`, with torch {torch.__version__} "
        f"and transformers {transformers.__version__}: {models} tiny random models, those of "
        "transformers with SDPA and with eager attention. *Cores* are counted without fxslim "
        "(`tests/zoo/cores.py`); several may be one attention. Half of the heads are removed, and "
        "the slim model is compared with the dense one whose output projections do not read them, "
        "at the example's sizes and at others: *equal* is to rounding. *Refused* means that no "
        "attention of the model can be pruned, *not captured* that `torch.export` does not take it "
        "as a whole."
    )


def _totals(results: Sequence[Result]) -> str:
    statuses = Counter(_said(result) for result in results)
    cores, found = sum(r.cores for r in results), sum(min(r.sites, r.cores) for r in results)
    sites, prunable = sum(r.sites for r in results), sum(r.prunable for r in results)
    missed = sum(r.cores for r in results if r.cores and not r.sites)
    return (
        f"{len(results)} checks: {', '.join(f'{n} {said}' for said, n in statuses.most_common())}. "
        f"{cores} cores, {sites} attentions found ({found} of them where as many cores are; "
        f"{missed} cores in models where none was found), {prunable} prunable."
    )


def _said(result: Result) -> str:
    return {"capture": "not captured"}.get(result.status, result.status)


def _rows(results: Sequence[Result]) -> Iterable[tuple[str, ...]]:
    """One row for an entry, two where the implementations of attention differ."""
    for name, of_entry in groupby(results, key=lambda result: result.name):
        same: dict[tuple[str, ...], list[str]] = {}
        for r in of_entry:
            row = (f"{r.cores}", f"{r.sites}", f"{r.prunable}", _said(r))
            same.setdefault(row, []).append(r.attn)
        for row, kinds in same.items():
            yield (f"`{name}`", ", ".join(sorted(kinds)), *row)


def _counts(heading: str, counts: Iterable[dict[str, int]]) -> str:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    rows = ((reason, f"{count}") for reason, count in total.most_common())
    return _table((heading, "attentions"), rows) if total else ""


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)
