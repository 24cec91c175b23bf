"""Output Fisher: how much the outputs change with each head, and with heads together, no labels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fxslim.contexts import Probe, probed
from fxslim.examples import Inputs, call_with
from fxslim.masks import head_masks
from fxslim.padding import Tell, Told, telling
from fxslim.progress import tracked
from fxslim.scores import Scores
from fxslim.sites import Site
from fxslim.streams import LossFn, again, averages, check_values, output_tensors, reduce_sum

__all__ = ["OutputFisher"]


@dataclass(frozen=True)
class OutputFisher:
    """Gauss-Newton of the outputs with respect to the head masks: E‖∂outputs/∂mask‖², all pairs.

    The squared change of all outputs (or of what `loss_fn` makes of them, of any shape) when heads
    go is, to second order, the sum of ``matrix`` over the pairs of them.  Its expectation over
    random signs v is that of (vᵀ ∂outputs/∂mask)², one backward pass a draw (Hutchinson 1989).

    With `compensated` only that part of a head's context counts which a bias and a linear function
    of the other heads' contexts of its layer cannot make up for: what is lost after the output
    projection is refitted (`fxslim.repair`).  Others go, too, so they are counted on as if each
    went with probability `dropped`: then the regression is one with a ridge, which is
    `dropped` / (1 − `dropped`) times each head's own covariance (Wager et al. 2013).  The scores
    come without the matrix: of two heads that make up for each other, each alone costs little and
    both much, which sums over pairs do not say.  Nor is there a matrix of more than 4,096 heads and
    channels.

    Attributes:
        compensated: count what is left to lose after repair, which takes a second pass over the
            data.
        draws: random projections of every batch's outputs.
        seed: of the random signs.
        dropped: the share of other heads that is not counted on, in [0, 1).
        needs_calibration: without batches it cannot score.
    """

    compensated: bool = False
    draws: int = 2
    seed: int = 0
    dropped: float = 0.9
    needs_calibration: ClassVar[bool] = True

    def score(
        self,
        masked: nn.Module,
        sites: Sequence[Site],
        calibration: Iterable[Inputs] | None = None,
        loss_fn: LossFn | None = None,
    ) -> Scores:
        """Needs calibration batches, and no labels."""
        check_values(masked)
        batches = again(calibration)
        watched, probes = probed(masked)
        tell = telling(masked)
        lost = self._lost(watched, probes, sites, batches, tell) if self.compensated else {}
        jacobian = _Jacobian(sites, probes, lost, head_masks(watched, [s.name for s in sites]))
        generator = torch.Generator().manual_seed(self.seed)
        for batch in tracked(batches, "scoring heads"):
            output = call_with(watched, batch)
            told = tell(batch) if loss_fn is None else Told()  # of an output that is not its own
            kept = _differentiable(output if loss_fn is None else loss_fn(output), told)
            for draw in range(self.draws):
                signs = [_signs(tensor, generator) * counts for tensor, counts in kept]
                total = sum((t * v).sum() for (t, _), v in zip(kept, signs, strict=True))
                assert isinstance(total, torch.Tensor)
                jacobian.add(total, keep=draw + 1 < self.draws)
        scores = jacobian.scores()
        return Scores(scores) if self.compensated else scores

    def _lost(
        self,
        watched: nn.Module,
        probes: Sequence[Probe],
        sites: Sequence[Site],
        batches: Iterable[Inputs],
        tell: Tell,
    ) -> dict[Probe, _Lost]:
        """What of each context the others cannot make up for, from one pass over the data."""
        moments = {probe: _Covariance(probe) for probe in probes}
        with torch.no_grad():
            for batch in tracked(batches, "reading contexts"):
                call_with(watched, batch)
                told = tell(batch)
                for covariance in moments.values():
                    covariance.add(told)
        units = {site.name: site.unit for site in sites}
        return {p: m.lost(units[p.context.site], self.dropped) for p, m in moments.items()}


class _Covariance:
    """Mean and covariance of the features of a context, streamed."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        n = len(probe.context.heads) + 1
        self._sums = torch.zeros(n, n, dtype=torch.float64)

    def add(self, told: Told) -> None:
        rows = self._probe.attended_rows(told).double()
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        self._sums = self._sums.to(rows.device) + rows.mT @ rows

    def lost(self, units: Sequence[Sequence[int]], dropped: float) -> _Lost:
        """The residual of each unit's features, given a share of those of all other units."""
        (sums,) = reduce_sum(self._sums)
        mean = sums[-1, :-1] / sums[-1, -1]
        covariance = sums[:-1, :-1] / sums[-1, -1] - torch.outer(mean, mean)
        heads = self._probe.context.heads.to(mean.device)
        own = covariance.where(heads[:, None] == heads, 0)
        system = covariance + dropped / (1 - dropped) * own
        system.diagonal().add_(_LEAST * covariance.diagonal().mean() + torch.finfo().tiny)
        precision = torch.linalg.inv(system)
        if len(units) == len(heads):  # channels, one feature each
            return _Lost(mean.float(), (precision / precision.diagonal()[:, None]).float())
        residual = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        for unit in units:
            rows = torch.isin(heads, torch.tensor(unit, device=heads.device)).nonzero().flatten()
            if len(rows):  # y − E[y | rest] is Λ⁻¹ᵧᵧ Λᵧ (all), with the precision Λ
                residual[rows] = torch.linalg.solve(precision[rows][:, rows], precision[rows])
        return _Lost(mean.float(), residual.float())


@dataclass(frozen=True)
class _Lost:
    """Features (rows, K) less what other units' features say of them: (x − mean) residualᵀ."""

    mean: torch.Tensor
    residual: torch.Tensor

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows - self.mean) @ self.residual.mT


class _Jacobian:
    """Sums over samples of the products of the outputs' derivatives by two heads' masks."""

    def __init__(
        self,
        sites: Sequence[Site],
        probes: Sequence[Probe],
        lost: Mapping[Probe, _Lost],
        masks: Mapping[str, torch.Tensor],
    ) -> None:
        self._sites, self._probes, self._lost, self._masks = sites, probes, lost, masks
        seen = {probe.context.site for probe in probes}
        self._bare = [site.name for site in sites if site.name not in seen]
        by_sample = not self._bare and all(p.context.samples is not None for p in probes)
        self._by_sample = by_sample
        ends = itertools.accumulate(site.size for site in sites)
        self._start = {s.name: e - s.size for s, e in zip(sites, ends, strict=True)}
        n = sum(site.size for site in sites)
        self._scores = torch.zeros(n, dtype=torch.float64)
        self._pairs = torch.zeros(n, n, dtype=torch.float64) if n <= _MOST_PAIRS else None
        self._unit = _units_of(sites)
        self._count = torch.zeros((), dtype=torch.float64)

    def add(self, total: torch.Tensor, *, keep: bool) -> None:
        """Count the derivatives of `total`."""
        values = [probe.value for probe in self._probes]
        masks = [self._masks[name] for name in self._bare]
        gradients = torch.autograd.grad(
            total, [*values, *masks], retain_graph=keep, allow_unused=True
        )
        rows: dict[str, torch.Tensor] = {}
        for probe, gradient in zip(self._probes, gradients, strict=False):
            if gradient is not None:
                name = probe.context.site
                rows[name] = rows.get(name, torch.zeros(())) + self._derivatives(probe, gradient)
        for name, gradient in zip(self._bare, gradients[len(values) :], strict=True):
            if gradient is not None:
                rows[name] = gradient.detach().float().cpu()[None]
        samples = max((len(row) for row in rows.values()), default=1)
        jacobian = torch.zeros(samples, len(self._scores), dtype=torch.float64)
        for name, row in rows.items():
            jacobian[:, self._start[name] : self._start[name] + row.shape[1]] = row
        unit = torch.zeros_like(jacobian).index_add_(1, self._unit, jacobian)
        self._scores += (jacobian * unit[:, self._unit]).sum(0)
        if self._pairs is not None:
            self._pairs += jacobian.mT @ jacobian
        self._count += 1

    def _derivatives(self, probe: Probe, gradient: torch.Tensor) -> torch.Tensor:
        """(samples, heads): by each head's mask, or by that of what would be lost of it."""
        context = probe.context
        value, gradient = (context.rows(t.detach()).float() for t in (probe.value, gradient))
        lost = self._lost.get(probe)
        products = (gradient * (lost(value) if lost else value)).sum(1)
        if not self._by_sample:
            products = products.sum(0, keepdim=True)
        heads = next(site.size for site in self._sites if site.name == context.site)
        sums = products.new_zeros(len(products), heads + 1)
        sums.index_add_(1, context.heads.to(sums.device), products)
        return sums[:, :-1].cpu()

    def scores(self) -> Scores:
        """A head's score is its share of what its unit costs, a batch; and the matrix."""
        totals = {"scores": self._scores}
        if self._pairs is not None:
            totals["pairs"] = self._pairs
        means = averages(totals, self._count)
        scores = torch.split(means["scores"], [site.size for site in self._sites])
        names = [site.name for site in self._sites]
        pairs = means.get("pairs")
        matrix = None if pairs is None else (pairs + pairs.mT) / 2
        return Scores(zip(names, scores, strict=True), matrix)


_LEAST = 1e-3
"""The least ridge, as a share of the features' mean square: heads may be the same."""

_MOST_PAIRS = 4096
"""With more heads and channels than this, the matrix of their pairs would be too large."""


def _units_of(sites: Sequence[Site]) -> torch.Tensor:
    """LongTensor (heads of all sites,): the first head of the unit that each is in."""
    start, found = 0, []
    for site in sites:
        first = torch.arange(site.size)
        for unit in site.unit:
            first[list(unit)] = min(unit)
        found.append(start + first)
        start += site.size
    return torch.cat(found)


def _differentiable(output: Any, told: Told) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors of an output that depend on the masks, and which of their positions count."""
    tensors = output_tensors(output)
    kept = [
        (tensor, tensor.new_ones(()) if counts is None else counts)
        for tensor, counts in zip(tensors, told.outputs(tensors), strict=True)
        if tensor.requires_grad
    ]
    if not kept:
        raise ValueError(
            "no output of the model depends on its attentions; pass loss_fn=lambda output: ..., "
            "which returns the tensor that is to stay"
        )
    return kept


def _signs(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    signs = torch.randint(0, 2, tensor.shape, generator=generator)
    return (2 * signs - 1).to(tensor.device, tensor.dtype)
