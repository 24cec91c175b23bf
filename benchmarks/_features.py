"""Tasks whose models give features: close to the dense ones, and still classified right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _tasks import Batch, Metric
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from fxslim.criteria import LossFn

__all__ = ["Embed", "FeatureTests", "TestSet", "features_of", "fit_probe", "project_at_random"]

Embed = Callable[[nn.Module, Batch], Tensor]
"""A module and its inputs to features (items, width)."""


@dataclass(frozen=True)
class TestSet:
    """Items that features are taken of.

    Attributes:
        name: Of the data.
        batches: The inputs.
        labels: (items,), in the order of the inputs.
        head: The frozen classifier; None where there are no classes.
    """

    __test__ = False  # no test of pytest's

    name: str
    batches: list[Batch]
    labels: Tensor
    head: nn.Linear | None = None


class FeatureTests:
    """Measures modules against the features that the dense model gives.

    Args:
        dense: The model that others are compared with.
        embed: How features are taken.
        sets: The items.
    """

    def __init__(self, dense: nn.Module, embed: Embed, sets: Sequence[TestSet]) -> None:
        self._embed, self._sets = embed, sets
        self._dense = [features_of(dense, items.batches, embed) for items in sets]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """A cosine for every set, and an accuracy for those with classes."""
        cosines = [Metric(f"cosine, {items.name}") for items in self._sets]
        labelled = [items for items in self._sets if items.head is not None]
        return (*cosines, *(Metric(f"accuracy, {items.name}") for items in labelled))

    def __call__(self, module: nn.Module) -> dict[str, Tensor]:
        """The values (items,) of every metric."""
        values = {}
        for items, dense in zip(self._sets, self._dense, strict=True):
            features = features_of(module, items.batches, self._embed)
            values[f"cosine, {items.name}"] = cosine_similarity(features, dense)
            if items.head is not None:
                right = items.head(features).argmax(1) == items.labels
                values[f"accuracy, {items.name}"] = right.float()
        return values


def features_of(module: nn.Module, batches: Sequence[Batch], embed: Embed) -> Tensor:
    """The features (items, width) of all batches, in float32 on the CPU."""
    with torch.no_grad():
        return torch.cat([embed(module, batch).float().cpu() for batch in batches])


def project_at_random(pool: Callable[[Any], Tensor], seed: int = 0) -> LossFn:
    """A loss that needs no labels: the product of features with random signs.

    Its squared gradient is, on average over the signs, the squared change of the features.

    Args:
        pool: An output to features.
        seed: The same seed gives the same signs, in the same order.
    """
    generator = torch.Generator().manual_seed(seed)

    def loss(output: Any) -> Tensor:
        features = pool(output)
        signs = 2 * torch.randint(0, 2, features.shape, generator=generator) - 1
        return (features * signs.to(features.device)).sum()

    return loss


def fit_probe(features: Tensor, labels: Tensor, decay: float = 1e-2) -> nn.Linear:
    """Logistic regression: the linear layer with the least cross-entropy plus squared norm.

    Args:
        features: (items, width); the norm is that of the weights for standardised features.
        labels: (items,), whole numbers from 0.
        decay: The weight of the squared norm.
    """
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
    inputs = (features - mean) / deviation
    weight = torch.zeros(int(labels.max()) + 1, features.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(inputs @ weight.T + bias, labels) + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    probe = nn.Linear(features.shape[1], len(weight)).requires_grad_(False)
    probe.weight.copy_(weight.detach() / deviation)
    probe.bias.copy_(bias.detach() - probe.weight @ mean)
    return probe
