"""Criteria that only run the model: what each head contributes, and what is lost without it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fxslim.contexts import Context, Probe, probed
from fxslim.examples import Inputs, call_with
from fxslim.masks import head_masks, restored
from fxslim.matrices import as_matrix
from fxslim.padding import Told, telling
from fxslim.parts import parts_of
from fxslim.progress import tracked
from fxslim.sites import Site
from fxslim.streams import LossFn, again, averages, check_values, given, output_tensors
from fxslim.undisturbed import seeded
from fxslim.walk import Walk

__all__ = ["Activation", "LeaveOneOut"]


@dataclass(frozen=True)
class Activation:
    """Energy of a head's contribution: E‖context_h W_O,h‖² over the rows of the batches.

    Attributes:
        needs_calibration: without batches it cannot score.
    """

    needs_calibration: ClassVar[bool] = True

    def score(
        self,
        masked: nn.Module,
        sites: Sequence[Site],
        calibration: Iterable[Inputs] | None = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, torch.Tensor]:
        """Needs calibration batches.

        Raises:
            ValueError: there are none, or a site's output projection is no matrix product.
        """
        check_values(masked)
        watched, probes = probed(masked)
        _check_seen(sites, {probe.context.site for probe in probes})
        weights = [_output_weight(masked, probe.context) for probe in probes]
        totals = {site.name: torch.zeros(site.size, dtype=torch.float64) for site in sites}
        count, tell = torch.zeros((), dtype=torch.float64), telling(masked)
        with torch.no_grad():
            for batch in tracked(given(calibration), "scoring heads"):
                call_with(watched, batch)
                told = tell(batch)
                for probe, weight in zip(probes, weights, strict=True):
                    total = totals[probe.context.site]
                    total += _energy(probe, weight, told)[: len(total)]
                count += 1
        return averages(totals, count)


def _energy(probe: Probe, weight: torch.Tensor, told: Told) -> torch.Tensor:
    """(heads + 1,): of each head in the last batch; those of no head come last."""
    rows = probe.attended_rows(told).float()
    heads = probe.context.heads.to(rows.device)
    pairs = (rows.mT @ rows) * (weight @ weight.mT) / len(rows)
    own = pairs.where(heads[:, None] == heads, 0).sum(1)
    return torch.zeros(int(heads.max()) + 1).index_add(0, heads.cpu(), own.cpu())


def _check_seen(sites: Sequence[Site], seen: set[str]) -> None:
    missing = [site.name for site in sites if site.name not in seen]
    if missing:
        raise ValueError(
            f"the output projection of {', '.join(missing)} is no product of rows with a matrix; "
            "use a criterion of the masks, such as 'output_fisher'"
        )


def _output_weight(masked: nn.Module, context: Context) -> torch.Tensor:
    """(features, outputs): the matrix that a context is multiplied by."""
    program = parts_of(masked)[context.part]
    node = next(n for n in program.graph.nodes if n.name == context.product.node)
    with torch.no_grad():
        weight = Walk(program, ()).constant(node.all_input_nodes[context.product.weight])
    return as_matrix(weight, context.product.weight_features).mT.float()


@dataclass(frozen=True)
class LeaveOneOut:
    """What the model loses without each unit of heads, one at a time: the slow reference.

    With a loss, how much it rises; without one, the mean squared change of the outputs.  A unit's
    loss is shared out evenly among its heads.

    Attributes:
        needs_calibration: without batches it cannot score.
    """

    needs_calibration: ClassVar[bool] = True

    def score(
        self,
        masked: nn.Module,
        sites: Sequence[Site],
        calibration: Iterable[Inputs] | None = None,
        loss_fn: LossFn | None = None,
    ) -> dict[str, torch.Tensor]:
        """Needs calibration batches; runs the model once for each unit and batch."""
        check_values(masked)
        batches = again(calibration)
        masks = head_masks(masked, [site.name for site in sites])
        units = [(site.name, list(unit)) for site in sites for unit in site.unit]
        scores = {site.name: torch.zeros(site.size, dtype=torch.float64) for site in sites}
        count, tell = torch.zeros((), dtype=torch.float64), telling(masked)
        with torch.no_grad():
            for batch in tracked(batches, "leaving heads out"):
                with seeded():
                    whole, told = call_with(masked, batch), tell(batch)
                for name, unit in units:
                    with restored([masks[name]]), seeded():
                        masks[name][unit] = 0
                        lost = _lost(whole, call_with(masked, batch), told, loss_fn)
                    scores[name][unit] += lost / len(unit)
                count += 1
        return averages(scores, count)


def _lost(whole: Any, without: Any, told: Told, loss_fn: LossFn | None) -> float:
    """The rise of the loss, or the squared change of the outputs where there is none."""
    if loss_fn is not None:
        return float(loss_fn(without) - loss_fn(whole))
    dense = output_tensors(whole)
    squares = (
        (a - b).double().square() * (1 if counts is None else counts)
        for a, b, counts in zip(dense, output_tensors(without), told.outputs(dense), strict=True)
    )
    return sum(float(square.sum()) for square in squares)
