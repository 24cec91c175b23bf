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
    """The smaller of ‖W_O W_V‖ and ‖W_Q W_K‖ of a head (Frobenius norms).

    The one bounds how much its context can add to the residual stream, the other how far apart its
    scores can be: a head that does little of either is little to miss.  Each is relative to its
    mean over the attention, since what a layer reads and adds to depends on the norms between.
    Where two weights do not pair up position by position, it is the product of their norms.
    """

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
            norms = torch.stack([_norms(masked, *pair) for pair in site.products if any(pair)])
            means = norms.mean(dim=1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)
            scores[site.name] = (norms / means).amin(0)
        return scores


def _norms(
    masked: nn.Module, left: Sequence[Projection], right: Sequence[Projection]
) -> torch.Tensor:
    """(heads,): the norm of the products of a head's slices; of the slices, if a side has none."""
    a, b = ([per_head(_slices_of(masked, p), p) for p in side] for side in (left, right))
    squared = [x.square().sum(dim=(1, 2)) for x in a + b if not (a and b)] + [
        ((x @ x.mT) * (y @ y.mT)).sum(dim=(1, 2)).clamp_min(0)
        if x.shape[1] == y.shape[1]
        else x.square().sum(dim=(1, 2)) * y.square().sum(dim=(1, 2))
        for x in a
        for y in b
    ]
    return torch.stack(squared).sum(0).sqrt().cpu()


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
