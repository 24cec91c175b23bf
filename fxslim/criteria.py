"""Criteria: how much each head matters.  A criterion is one small class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from fxslim.contributions import Activation, LeaveOneOut
from fxslim.examples import Inputs
from fxslim.fisher import OutputFisher
from fxslim.magnitudes import Magnitude, Random, WeightProduct
from fxslim.sensitivity import Sensitivity, Snip
from fxslim.sites import Site
from fxslim.streams import LossFn, given

__all__ = ["CRITERIA", "Criterion", "LossFn", "chosen", "default_criterion"]


class Criterion(Protocol):
    """Anything with this `score` method is a criterion."""

    def score(
        self,
        masked: nn.Module,
        sites: Sequence[Site],
        calibration: Iterable[Inputs] | None,
        loss_fn: LossFn | None,
    ) -> dict[str, torch.Tensor]:
        """Return, for each prunable site by name, a tensor (heads,); higher matters more."""
        ...


CRITERIA: Mapping[str, Criterion] = {
    "activation": Activation(),
    "compensated_fisher": OutputFisher(compensated=True),
    "fisher": Sensitivity(power=2),
    "leave_one_out": LeaveOneOut(),
    "magnitude": Magnitude(),
    "output_fisher": OutputFisher(),
    "random": Random(),
    "sensitivity": Sensitivity(power=1),
    "snip": Snip(),
    "snip_momentum": Snip(momentum=0.9),
    "taylor": Sensitivity(power=1),
    "weight_product": WeightProduct(),
}


def default_criterion(*, calibrated: bool, repaired: bool) -> str:
    """The best criterion for what is there: batches or none, a repair to follow or not."""
    if not calibrated:
        return "weight_product"
    return "compensated_fisher" if repaired else "output_fisher"


def chosen(criterion: str | Criterion, calibration: Iterable[Inputs] | None) -> Criterion:
    """The criterion itself, and that what it needs is there.

    Raises:
        ValueError: its name is unknown, or it needs calibration batches.
    """
    found = CRITERIA.get(criterion) if isinstance(criterion, str) else criterion
    if found is None:
        raise ValueError(f"unknown criterion {criterion!r}; known: {', '.join(CRITERIA)}")
    if getattr(found, "needs_calibration", False):
        given(calibration)
    return found
