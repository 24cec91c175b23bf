"""Criteria that look at weights alone, and the random baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fxslim.examples import Inputs
from fxslim.graph import attribute
from fxslim.sites import Projection, Site
from fxslim.streams import LossFn, with_values

__all__ = ["Magnitude", "Random", "WeightProduct", "per_head", "slices"]


def slices(weight: torch.Tensor, projection: Projection) -> torch.Tensor:
    """(heads, positions per head, rest): the slices of a projection's weight, in float32."""
    index = projection.index.to(weight.device)
    rows = weight.float().movedim(projection.dim, 0)[index]
    return rows.reshape(*index.shape, -1)


def _slices_of(masked: nn.Module, projection: Projection) -> torch.Tensor:
    """The slices of a weight of the model."""
    name = projection.weight
    return slices(with_values(attribute(masked, name), name), projection)


def per_head(values: torch.Tensor, projection: Projection) -> torch.Tensor:
    """Rows of a projection given to each (query) head that has one; zeros to the others."""
    row_of = projection.row_of.to(values.device)
    absent = (row_of < 0).reshape(-1, *[1] * (values.ndim - 1))
    return values[row_of].masked_fill(absent, 0)


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
        sites: Sequence[Site],
        calibration: Iterable[Inputs] | None = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, torch.Tensor]:
        """Needs no data."""
        scores: dict[str, torch.Tensor] = {}
        for site in sites:
            total = torch.zeros(site.size)
            for projection in site.projections:
                sizes = _slices_of(masked, projection).abs() ** self.order
                mean = sizes.mean(dim=(1, 2)) ** (1 / self.order)
                total += per_head(mean.cpu(), projection)
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
        sites: Sequence[Site],
        calibration: Iterable[Inputs] | None = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, torch.Tensor]:
        """Needs no data."""
        return {site.name: self._site(masked, site) for site in sites}

    def _site(self, masked: nn.Module, site: Site) -> torch.Tensor:
        total = torch.zeros(site.size)
        for out in site.summed_by:
            o = per_head(_slices_of(masked, out), out)
            for value in site.made_by:
                v = per_head(_slices_of(masked, value), value)
                if v.shape[1] == o.shape[1]:
                    squared = ((o @ o.mT) * (v @ v.mT)).sum(dim=(1, 2))
                else:
                    squared = o.square().sum(dim=(1, 2)) * v.square().sum(dim=(1, 2))
                total += squared.clamp_min(0).cpu()
            if not site.made_by:
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
        sites: Sequence[Site],
        calibration: Iterable[Inputs] | None = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, torch.Tensor]:
        """Needs no data."""
        generator = torch.Generator().manual_seed(self.seed)
        return {s.name: torch.rand(s.size, generator=generator) for s in sites}
