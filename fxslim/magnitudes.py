"""Criteria that look at weights alone, and the random baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fxslim.examples import Inputs
from fxslim.graph import attribute
from fxslim.sites import AttentionSite, Projection
from fxslim.streams import LossFn, with_values

__all__ = ["Magnitude", "Random", "WeightProduct", "per_query_head", "slices"]


def slices(weight: torch.Tensor, projection: Projection) -> torch.Tensor:
    """(heads, positions per head, rest): the slices of a projection's weight, in float32."""
    index = projection.index.to(weight.device)
    rows = weight.float().movedim(projection.dim, 0)[index]
    return rows.reshape(*index.shape, -1)


def _slices_of(masked: nn.Module, projection: Projection) -> torch.Tensor:
    """The slices of a weight of the model."""
    name = projection.weight
    return slices(with_values(attribute(masked, name), name), projection)


def per_query_head(values: torch.Tensor, site: AttentionSite) -> torch.Tensor:
    """Rows of KV heads given to each query head that shares them; others as they are."""
    if len(values) == site.num_heads:
        return values
    if len(site.unit) != len(values):
        return values.repeat_interleave(site.num_heads // len(values), 0)
    owner = {head: number for number, unit in enumerate(site.unit) for head in unit}
    return values[[owner[head] for head in range(site.num_heads)]]


@dataclass(frozen=True)
class Magnitude:
    """Mean size of a head's weights over its projections (Intel Neural Compressor's criterion).

    Attributes:
        order: 1 takes the mean absolute weight, 2 the root of the mean square.
    """

    order: int = 1

    def score(
        self,
        masked: nn.Module,
        sites: Sequence[AttentionSite],
        calibration: Iterable[Inputs] | None = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, torch.Tensor]:
        """Needs no data."""
        scores: dict[str, torch.Tensor] = {}
        for site in sites:
            total = torch.zeros(site.num_heads)
            for projection in site.projections:
                sizes = _slices_of(masked, projection).abs() ** self.order
                mean = sizes.mean(dim=(1, 2)) ** (1 / self.order)
                total += per_query_head(mean.cpu(), site)
            scores[site.name] = total
        return scores


@dataclass(frozen=True)
class WeightProduct:
    """‖W_O W_V‖ of a head: how much its context can add to the residual stream (Frobenius norm).

    Relative to the mean of its attention, since what a layer adds to depends on the norms between.
    Where value and output weights do not pair up position by position, the product of their norms.
    """

    def score(
        self,
        masked: nn.Module,
        sites: Sequence[AttentionSite],
        calibration: Iterable[Inputs] | None = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, torch.Tensor]:
        """Needs no data."""
        return {site.name: self._site(masked, site) for site in sites}

    def _site(self, masked: nn.Module, site: AttentionSite) -> torch.Tensor:
        total = torch.zeros(site.num_heads)
        for out in site.output:
            o = _slices_of(masked, out)
            for value in site.value:
                v = per_query_head(_slices_of(masked, value), site)
                if v.shape[1] == o.shape[1]:
                    squared = ((o @ o.mT) * (v @ v.mT)).sum(dim=(1, 2))
                else:
                    squared = o.square().sum(dim=(1, 2)) * v.square().sum(dim=(1, 2))
                total += squared.clamp_min(0).cpu()
            if not site.value:
                total += o.square().sum(dim=(1, 2)).cpu()
        norms = total.sqrt()
        return norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny)


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
    ) -> dict[str, torch.Tensor]:
        """Needs no data."""
        generator = torch.Generator().manual_seed(self.seed)
        return {s.name: torch.rand(s.num_heads, generator=generator) for s in sites}
