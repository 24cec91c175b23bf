"""The sentence encoder all-MiniLM-L6-v2: embeddings, and classes of real text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from _corpora import deal, labelled
from _features import FeatureTests, TestSet, features_of, fit_probe, project_at_random
from _tasks import Batch, Setup, Task
from torch import Tensor, nn
from torch.nn.functional import normalize

from fxslim.demo import find_encoder, paragraphs
from fxslim.workflow import import_transformers, load_model

__all__ = ["encoder_task", "paragraphs_task"]

_LABELLED = {"20news": ("20newsgroups", 4000), "R8": ("reuters-r8", 3000)}
"""The table of each labelled set, and how many texts its probe is trained on."""

_TOKENS, _BATCH, _CALIBRATION_BATCH = 128, 32, 8

Pairs = Sequence[tuple[str, str]]
"""Texts with their labels."""


def encoder_task(setup: Setup) -> Task:
    """Cosine to the dense embeddings, and accuracy of frozen probes of the dense embeddings.

    Calibration text comes from where test text comes from: docstrings of other files, and training
    texts that no probe was trained on.
    """
    model, text = _encoder(setup)
    docstrings, held_out = paragraphs()
    calibration = deal(docstrings, min(setup.calibration, len(docstrings)))
    sets = [_docstrings(text, held_out)]
    for name, (table, count) in _LABELLED.items():
        train, test = labelled(setup.sources, table)
        classes = sorted({label for _, label in train})
        scored, fitted = deal(train, setup.calibration, count)
        (judged,) = deal(test, min(setup.items, len(test)))
        calibration.append([words for words, _ in scored])
        inputs, labels = text.batches(fitted, classes)
        head = fit_probe(features_of(model, inputs, _embed), labels)
        sets.append(TestSet(name, *text.batches(judged, classes), head))
    return _task("encoder", model, sets, [b for c in calibration for b in text.even_batches(c)])


def paragraphs_task(setup: Setup) -> Task:
    """Cosine to the dense embeddings of docstrings; heads are chosen on those of other files."""
    model, text = _encoder(setup)
    docstrings, held_out = paragraphs(setup.calibration)
    return _task("paragraphs", model, [_docstrings(text, held_out)], text.even_batches(docstrings))


def _encoder(setup: Setup) -> tuple[nn.Module, _Text]:
    folder = find_encoder()
    return load_model(folder).to(setup.device), _Text(folder, setup.device)


def _docstrings(text: _Text, held_out: Sequence[str]) -> TestSet:
    return TestSet("docstrings", *text.batches([(words, "") for words in held_out], [""]))


def _task(name: str, model: nn.Module, sets: Sequence[TestSet], calibration: list[Batch]) -> Task:
    tests = FeatureTests(model, _embed, sets)
    return Task(
        name=name,
        model=model,
        example=sets[0].batches[0],
        calibration=calibration,
        loss_fn=project_at_random(lambda output: output.last_hidden_state.mean(1)),
        metrics=tests.metrics,
        measure=tests,
    )


def _embed(encoder: nn.Module, batch: Batch) -> Tensor:
    """Sentence embeddings of length 1: the mean over the tokens that are not padding."""
    states = encoder(**batch).last_hidden_state.float()
    weights = batch["attention_mask"].unsqueeze(-1).float()
    return normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


class _Text:
    """Turns texts into batches of inputs, shortest first."""

    def __init__(self, folder: Any, device: str) -> None:
        transformers = import_transformers()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._device = device

    def batches(self, pairs: Pairs, classes: Sequence[str]) -> tuple[list[Batch], Tensor]:
        """Padded batches, and in their order the number of each text's class among `classes`."""
        rows = self._rows([text for text, _ in pairs])
        labels = torch.tensor([classes.index(pairs[place][1]) for place, _ in rows])
        chunks = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
        return [self._padded([row for _, row in chunk]) for chunk in chunks], labels

    def even_batches(self, texts: Sequence[str]) -> list[Batch]:
        """Batches without padding: each is cut to its shortest text."""
        rows = [row for _, row in self._rows(texts)]
        size = _CALIBRATION_BATCH
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [self._padded([row[: len(chunk[0])] for row in chunk]) for chunk in chunks]

    def _rows(self, texts: Sequence[str]) -> list[tuple[int, list[int]]]:
        """Place and tokens of each text, shortest first."""
        tokens = self._tokenizer(list(texts), truncation=True, max_length=_TOKENS)["input_ids"]
        return sorted(enumerate(tokens), key=lambda row: len(row[1]))

    def _padded(self, rows: list[list[int]]) -> Batch:
        padded = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        return {name: padded[name].to(self._device) for name in ("input_ids", "attention_mask")}
