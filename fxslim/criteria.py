"""Criteria: how much each head matters.  A criterion is one small class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from fxslim.examples import Inputs, call_with
from fxslim.graph import attribute
from fxslim.masks import head_masks
from fxslim.sites import AttentionSite, Projection

__all__ = [
    "CRITERIA",
    "Criterion",
    "LossFn",
    "Magnitude",
    "Random",
    "Sensitivity",
    "WeightProduct",
    "chosen",
]

LossFn = Callable[[Any], torch.Tensor]
Scores = dict[str, torch.Tensor]


class Criterion(Protocol):
    """Anything with this `score` method is a criterion."""

    def score(
        self,
        masked: nn.Module,
        sites: Sequence[AttentionSite],
        calibration: Iterable[Inputs] | None,
        loss_fn: LossFn | None,
    ) -> Scores:
        """Return, for each prunable site by name, a tensor (heads,); higher matters more."""
        ...


def _rows(masked: nn.Module, projection: Projection) -> torch.Tensor:
    """(heads, positions per head, rest): the weight's slices, one a head, in float32."""
    weight = _with_values(attribute(masked, projection.weight), projection.weight).float()
    index = projection.index.to(weight.device)
    rows = weight.movedim(projection.dim, 0)[index]
    return rows.reshape(*index.shape, -1)


def _with_values(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """`tensor` detached; refused where it is on `meta`, so that it has no values to score."""
    if tensor.is_meta:
        raise ValueError(
            f"heads cannot be scored: {name!r} is on the meta device and has no values; load the "
            "weights first, or pass a plan, or criterion='random'"
        )
    return tensor.detach()


def _per_query_head(values: torch.Tensor, site: AttentionSite) -> torch.Tensor:
    """Rows of KV heads given to each query head that shares them; others as they are."""
    if len(values) == site.num_heads:
        return values
    if len(site.unit) != len(values):
        return values.repeat_interleave(site.num_heads // len(values), 0)
    owner = {head: number for number, unit in enumerate(site.unit) for head in unit}
    return values[[owner[head] for head in range(site.num_heads)]]


@dataclass(frozen=True)
class Magnitude:
    """Mean absolute weight of a head over its projections (Intel Neural Compressor's criterion)."""

    def score(
        self,
        masked: nn.Module,
        sites: Sequence[AttentionSite],
        calibration: Iterable[Inputs] | None = None,
        loss_fn: LossFn | None = None,
    ) -> Scores:
        """Needs no data."""
        scores: Scores = {}
        for site in sites:
            total = torch.zeros(site.num_heads)
            for projection in (*site.query, *site.key, *site.value, *site.output):
                mean = _rows(masked, projection).abs().mean(dim=(1, 2)).cpu()
                total += _per_query_head(mean, site)
            scores[site.name] = total
        return scores


@dataclass(frozen=True)
class WeightProduct:
    """‖W_O W_V‖ of a head: how much its context can add to the residual stream (Frobenius norm).

    Where value and output weights do not pair up position by position, the product of their norms.
    """

    def score(
        self,
        masked: nn.Module,
        sites: Sequence[AttentionSite],
        calibration: Iterable[Inputs] | None = None,
        loss_fn: LossFn | None = None,
    ) -> Scores:
        """Needs no data."""
        return {site.name: self._site(masked, site) for site in sites}

    def _site(self, masked: nn.Module, site: AttentionSite) -> torch.Tensor:
        total = torch.zeros(site.num_heads)
        for out in site.output:
            o = _rows(masked, out)
            for value in site.value:
                v = _per_query_head(_rows(masked, value), site)
                if v.shape[1] == o.shape[1]:
                    squared = ((o @ o.mT) * (v @ v.mT)).sum(dim=(1, 2))
                else:
                    squared = o.square().sum(dim=(1, 2)) * v.square().sum(dim=(1, 2))
                total += squared.clamp_min(0).cpu()
            if not site.value:
                total += o.square().sum(dim=(1, 2)).cpu()
        return total.sqrt()


@dataclass(frozen=True)
class Random:
    """Uniform random scores: the baseline that a criterion has to beat.

    Attributes:
        seed: the same seed gives the same scores.
    """

    seed: int = 0

    def score(
        self,
        masked: nn.Module,
        sites: Sequence[AttentionSite],
        calibration: Iterable[Inputs] | None = None,
        loss_fn: LossFn | None = None,
    ) -> Scores:
        """Needs no data."""
        generator = torch.Generator().manual_seed(self.seed)
        return {s.name: torch.rand(s.num_heads, generator=generator) for s in sites}


@dataclass(frozen=True)
class Sensitivity:
    """The loss's gradient with respect to each head's mask, over batches.

    ``power=1``: mean |∂L/∂mask| (Michel et al. 2019).  ``power=2``: mean (∂L/∂mask)², the diagonal
    of the masks' empirical Fisher information (Kwon et al. 2022).

    Attributes:
        power: 1 or 2.
        needs_calibration: without batches it cannot score.
    """

    power: int = 1
    needs_calibration: ClassVar[bool] = True

    def score(
        self,
        masked: nn.Module,
        sites: Sequence[AttentionSite],
        calibration: Iterable[Inputs] | None = None,
        loss_fn: LossFn | None = None,
    ) -> Scores:
        """Needs calibration batches, and a loss of the output (or an output with `.loss`)."""
        batches = _given(calibration)
        for name, parameter in masked.named_parameters():
            _with_values(parameter, name)
        masks = head_masks(masked, [site.name for site in sites])
        total: Scores = {n: torch.zeros_like(m, dtype=torch.float32) for n, m in masks.items()}
        count = 0
        for batch in batches:
            loss = _loss(call_with(masked, batch), loss_fn)
            gradients = torch.autograd.grad(loss, list(masks.values()), allow_unused=True)
            for name, gradient in zip(masks, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.float().abs() ** self.power
            count += 1
        if not count:
            raise ValueError("calibration has no batches")
        return {name: (value / count).cpu() for name, value in total.items()}


def _loss(output: Any, loss_fn: LossFn | None) -> torch.Tensor:
    if loss_fn is not None:
        return loss_fn(output)
    loss = getattr(output, "loss", None)
    if loss is None:
        raise ValueError("the model's output has no .loss; pass loss_fn=lambda output: ...")
    assert isinstance(loss, torch.Tensor)
    return loss


CRITERIA: Mapping[str, Criterion] = {
    "fisher": Sensitivity(power=2),
    "magnitude": Magnitude(),
    "random": Random(),
    "taylor": Sensitivity(power=1),
    "weight_product": WeightProduct(),
}


def chosen(criterion: str | Criterion, calibration: Iterable[Inputs] | None) -> Criterion:
    """The criterion itself, and that what it needs is there.

    Raises:
        ValueError: its name is unknown, or it needs calibration batches.
    """
    found = CRITERIA.get(criterion) if isinstance(criterion, str) else criterion
    if found is None:
        raise ValueError(f"unknown criterion {criterion!r}; known: {', '.join(CRITERIA)}")
    if getattr(found, "needs_calibration", False):
        _given(calibration)
    return found


def _given(calibration: Iterable[Inputs] | None) -> Iterable[Inputs]:
    if calibration is None:
        raise ValueError("this criterion needs calibration batches: pass calibration=[...]")
    return calibration
