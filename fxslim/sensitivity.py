"""Criteria by the gradient of a loss: with respect to the masks, or to the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fxslim.examples import Inputs, call_with
from fxslim.graph import attribute
from fxslim.magnitudes import per_head, slices
from fxslim.masks import head_masks
from fxslim.progress import tracked
from fxslim.sites import Site
from fxslim.streams import LossFn, averages, check_values, given, reduce_sum

__all__ = ["Sensitivity", "Snip"]


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
        sites: Sequence[Site],
        calibration: Iterable[Inputs] | None = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, torch.Tensor]:
        """Needs calibration batches, and a loss of the output (or an output with `.loss`)."""
        masks = head_masks(masked, [site.name for site in sites])
        total = {n: torch.zeros_like(m, dtype=torch.float32) for n, m in masks.items()}
        count = torch.zeros(())
        for gradients in _gradients(masked, list(masks.values()), calibration, loss_fn):
            for name, gradient in zip(masks, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.float().abs() ** self.power
            count += 1
        return {name: mean.cpu() for name, mean in averages(total, count).items()}


@dataclass(frozen=True)
class Snip:
    """Mean |weight · ∂L/∂weight| of a head over its projections (SNIP, Lee et al. 2019).

    Batch after batch, the score is `momentum` times what it was plus the batch's; Intel Neural
    Compressor's ``snip_momentum`` has 0.9, its ``snip`` none (the last batch's alone).

    Attributes:
        momentum: what stays of earlier batches' scores.
        needs_calibration: without batches it cannot score.
    """

    momentum: float = 0.0
    needs_calibration: ClassVar[bool] = True

    def score(
        self,
        masked: nn.Module,
        sites: Sequence[Site],
        calibration: Iterable[Inputs] | None = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, torch.Tensor]:
        """Needs calibration batches, and a loss of the output (or an output with `.loss`)."""
        used = [(s, p) for s in sites for p in s.projections]
        names = list(dict.fromkeys(projection.weight for _, projection in used))
        weights = {name: attribute(masked, name) for name in names}
        scores = {site.name: torch.zeros(site.size) for site in sites}
        for gradients in _gradients(masked, list(weights.values()), calibration, loss_fn):
            products = {
                name: torch.zeros_like(weight) if gradient is None else (weight * gradient).detach()
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            }
            scores = {name: self.momentum * score for name, score in scores.items()}
            for site, projection in used:
                rows = slices(products[projection.weight], projection).abs().mean(dim=(1, 2))
                scores[site.name] += per_head(rows.cpu(), projection)
        sums = reduce_sum(*scores.values())
        return dict(zip(scores, sums, strict=True))


def _gradients(
    masked: nn.Module,
    wanted: Sequence[torch.Tensor],
    calibration: Iterable[Inputs] | None,
    loss_fn: LossFn | None,
) -> Iterator[tuple[torch.Tensor | None, ...]]:
    """The loss's gradients, batch after batch.

    Raises:
        ValueError: there is no batch, no loss, or no values.
    """
    check_values(masked)
    count = 0
    for batch in tracked(given(calibration), "scoring heads"):
        loss = _loss_of(call_with(masked, batch), loss_fn)
        yield torch.autograd.grad(loss, list(wanted), allow_unused=True)
        count += 1
    if not count:
        raise ValueError("calibration has no batches")


def _loss_of(output: Any, loss_fn: LossFn | None) -> torch.Tensor:
    """What `loss_fn` makes of an output, or the loss that it has already."""
    if loss_fn is not None:
        return loss_fn(output)
    loss = getattr(output, "loss", None)
    if loss is None:
        raise ValueError("the model's output has no .loss; pass loss_fn=lambda output: ...")
    assert isinstance(loss, torch.Tensor)
    return loss
