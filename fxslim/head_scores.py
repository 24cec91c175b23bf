"""Head scores: how much heads matter by their weights and gradients, at a step of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fxslim.magnitudes import per_head, slices
from fxslim.sites import Site

__all__ = ["CRITERION_TYPES", "REDUCTIONS", "CriterionType", "head_scores"]


@dataclass(frozen=True)
class CriterionType:
    """What one weight contributes to the score of its head.

    Attributes:
        of: from a weight and its gradient to a tensor of the same shape.
        needs_gradients: whether it uses the gradient.
        momentum: what stays of the score of the step before.
    """

    of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    needs_gradients: bool = True
    momentum: float = 0.0


def _sensitivity(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return (weight * gradient).abs()


CRITERION_TYPES: Mapping[str, CriterionType] = {
    "gradient": CriterionType(lambda weight, gradient: gradient.abs()),
    "magnitude": CriterionType(lambda weight, gradient: weight.abs(), needs_gradients=False),
    "snip": CriterionType(_sensitivity),
    "snip_momentum": CriterionType(_sensitivity, momentum=0.9),
}
"""Intel Neural Compressor's criteria; SNIP is Lee et al. 2019."""

REDUCTIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "max": lambda values: values.amax(dim=(1, 2)),
    "mean": lambda values: values.mean(dim=(1, 2)),
    "sum": lambda values: values.sum(dim=(1, 2)),
}
"""From (heads, positions, weights per position) to one number a head."""


@torch.no_grad()
def head_scores(
    site: Site,
    parameters: Mapping[str, torch.Tensor],
    criterion: CriterionType,
    reduction: str,
) -> torch.Tensor:
    """The mean over a site's projections of what each gives to a head: float32 (heads,).

    A weight without a gradient gives nothing.

    Args:
        site: an attention.
        parameters: by name, the weights of its projections, with their gradients.
        criterion: what a weight contributes.
        reduction: a name in `REDUCTIONS`.
    """
    total = torch.zeros(site.size)
    for projection in site.projections:
        weight = parameters[projection.weight]
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        values = slices(criterion.of(weight.float(), gradient.float()), projection)
        total += per_head(REDUCTIONS[reduction](values).cpu(), projection)
    return total / len(site.projections)
