"""The pruner: at some steps of a training run, heads that matter least are masked for good."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from glob import escape
from typing import Any, cast

import torch
from torch import nn

from fxslim.constraints import Constraints
from fxslim.errors import PlanError
from fxslim.head_compression import HeadCompression
from fxslim.head_scores import CRITERION_TYPES, CriterionType, head_scores
from fxslim.planning import plan
from fxslim.pruning_config import PruningConfig
from fxslim.streams import reduce_sum
from fxslim.training_masks import state_name
from fxslim.training_sites import check_whole

__all__ = ["MultiheadAttentionPruner"]


class MultiheadAttentionPruner:
    """Prune the heads of some attentions while a model is trained, as one config says.

    Call the hooks in this order at each step: `on_step_begin` before the forward,
    `on_before_optimizer_step` when the gradients are there, `on_after_optimizer_step`.
    `fxslim.prepare_pruning` has the optimizer call them.  A head that is masked stays masked.

    Masks, scores and the step are buffers of the model: its state dict holds all that the next
    decisions depend on.

    Args:
        config: a dict with the keys of `fxslim.PruningConfig`, or such a config.
        mha_compressions: {site name: its `HeadCompression`}, at least one.
    """

    def __init__(
        self,
        config: PruningConfig | Mapping[str, Any],
        mha_compressions: Mapping[str, HeadCompression],
    ) -> None:
        self.config = config if isinstance(config, PruningConfig) else PruningConfig.of(config)
        self.config.check_schedule()
        self.mha_compressions = dict(mha_compressions)
        if not self.mha_compressions:
            raise ValueError("a pruner needs at least one attention")
        first, *_ = self.mha_compressions.values()
        self.model, self._step = first.masks.model, state_name(first.site.name, "step")
        step = torch.zeros((), dtype=torch.long, device=first.mask.device)
        self.model.register_buffer(self._step, step)
        for name, compression in self.mha_compressions.items():
            zeros = torch.zeros(compression.site.size, device=compression.mask.device)
            self.model.register_buffer(state_name(name, "scores"), zeros)

    @property
    def linear_layers(self) -> dict[str, nn.Module]:
        """{name: module} of all weights that carry heads; mostly `nn.Linear`, four a site."""
        layers = [compression.layers for compression in self.mha_compressions.values()]
        return {name: layer for found in layers for name, layer in found.items()}

    @property
    def step(self) -> torch.Tensor:
        """() int64: the optimizer steps done."""
        return cast(torch.Tensor, getattr(self.model, self._step))

    @property
    def head_masks(self) -> dict[str, torch.Tensor]:
        """{site name: (1, heads)}: views of the masks."""
        return {name: c.mask.unsqueeze(0) for name, c in self.mha_compressions.items()}

    @property
    def mha_scores(self) -> dict[str, torch.Tensor]:
        """{site name: (1, heads)}: views of the present scores, all zero before there are any."""
        return {name: self._scores(name).unsqueeze(0) for name in self.mha_compressions}

    def on_step_begin(self, local_step: int = 0) -> None:
        """Mask heads, if this step is one of the schedule's.  `local_step` is not used.

        Raises:
            PlanError: the config's bounds cannot be met, or no gradient has reached an attention.
            UnsupportedSite: the parameters have been sharded.
        """
        step = int(self.step)
        if self.config.schedule.prunes_at(step):
            self._prune(self.config.schedule.sparsity(step), last=step == self.config.schedule.last)

    def on_before_optimizer_step(self) -> None:
        """Take the gradients into the scores.

        Raises:
            UnsupportedSite: the parameters have been sharded.
        """
        if self._criterion.needs_gradients:
            self._score()

    def on_after_optimizer_step(self) -> None:
        """Count the step."""
        self.step.add_(1)

    @property
    def _criterion(self) -> CriterionType:
        return CRITERION_TYPES[self.config.criterion_type]

    def _score(self) -> None:
        """Update the scores by the present weights and gradients."""
        check_whole(*self.linear_layers.values())
        for name, compression in self.mha_compressions.items():
            new = head_scores(
                compression.site,
                compression.weights,
                self._criterion,
                self.config.criterion_reduce_type,
            )
            scores = self._scores(name)
            scores.mul_(self._criterion.momentum).add_(new.to(scores.device))

    def _prune(self, sparsity: float, *, last: bool) -> None:
        """Mask the heads that matter least, up to a share of all heads."""
        if not self._criterion.needs_gradients:
            self._score()
        scores = self._averaged_scores()
        gone = {name: c.mask.cpu() == 0 for name, c in self.mha_compressions.items()}
        wanted = math.floor(sparsity * sum(map(len, gone.values())) + 1e-9)
        if wanted <= sum(int(masked.sum()) for masked in gone.values()):
            return
        self._check_gradients(scores, gone)
        sites = [compression.site for compression in self.mha_compressions.values()]
        with warnings.catch_warnings():
            if not last:  # fewer heads than go together: they go at a later step
                warnings.filterwarnings("ignore", message="fxslim.plan: no head was removed")
            made = plan(
                _gone_first(scores, gone),
                sites,
                sparsity,
                scope=self.config.pruning_scope,
                constraints=self._bounds(sparsity),
            )
        for name, compression in self.mha_compressions.items():
            kept = torch.zeros_like(compression.mask)
            kept[made.kept[name]] = 1
            compression.mask.mul_(kept)

    def _averaged_scores(self) -> dict[str, torch.Tensor]:
        """The scores, averaged over the processes, so that all of them mask the same heads."""
        own = [self._scores(name) for name in self.mha_compressions]
        processes = reduce_sum(torch.ones((), device=own[0].device))[0]
        for scores, total in zip(own, reduce_sum(*own), strict=True):
            scores.copy_(total / processes)
        return {name: self._scores(name).cpu() for name in self.mha_compressions}

    def _check_gradients(
        self, scores: Mapping[str, torch.Tensor], gone: Mapping[str, torch.Tensor]
    ) -> None:
        for name, values in scores.items():
            if self._criterion.needs_gradients and not values[~gone[name]].any():
                raise PlanError(
                    f"no gradient has reached {name!r} by step {int(self.step)}, so its heads have "
                    "no scores: are its weights frozen, or its layer skipped?  Exclude it "
                    "(excluded_op_names), or use criterion_type='magnitude'"
                )

    def _bounds(self, sparsity: float) -> Constraints:
        """The config's bounds on each site, as far as this sparsity has them reached."""
        progress = sparsity / self.config.target_sparsity
        most = {}
        for name, compression in self.mha_compressions.items():
            units = len(compression.site.unit)
            go = math.floor(progress * self.config.min_sparsity_ratio_per_op * units + 1e-9)
            most[escape(name)] = 1 - go / units
        return Constraints(
            min_share=1 - self.config.max_sparsity_ratio_per_op,
            max_share=most,
            multiple_of=self.config.rounding,
        )

    def _scores(self, site: str) -> torch.Tensor:
        return cast(torch.Tensor, getattr(self.model, state_name(site, "scores")))


def _gone_first(
    scores: Mapping[str, torch.Tensor], gone: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Scores by which the heads that are masked already are the first to go."""
    lowest = -1.0 - sum(float(values.abs().sum()) for values in scores.values())
    return {
        name: values.double().masked_fill(gone[name], lowest) for name, values in scores.items()
    }
