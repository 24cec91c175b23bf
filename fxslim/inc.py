"""Pruning while training, with the names of Intel Neural Compressor: configs in, hooks on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fxslim.errors import PlanError
from fxslim.examples import Inputs
from fxslim.head_compression import HeadCompression, ProgramMasks
from fxslim.masks import head_masks
from fxslim.parts import meta_of
from fxslim.pruner import MultiheadAttentionPruner
from fxslim.pruning_config import PATTERNS, PruningConfig, chosen_sites
from fxslim.sites import Site
from fxslim.training_masks import HeadMasks
from fxslim.training_sites import bare, training_sites

__all__ = ["Pruning", "hook_optimizer_", "parse_auto_slim_config", "prepare_pruning"]


def parse_auto_slim_config(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    mha_sparsity: float = 0.0,
    ffn2_sparsity: float = 0.0,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Make pruning configs for what a model has: plain dicts, to print and to edit.

    Args:
        model: not changed.
        example_inputs: as for `fxslim.capture`.
        mha_sparsity: the share of attention heads to remove, in [0, 1); 0 makes no config.
        ffn2_sparsity: the share of the channels of feed-forward blocks to remove, in [0, 1); 0
            makes no config.
        kwargs: any key of `fxslim.PruningConfig`, for every config.

    Returns:
        One config for attentions and one for feed-forward blocks, if they are to be pruned, with
        those that can be as `op_names`.

    Raises:
        ValueError, TypeError: an unknown key, or a value that makes no sense.
        CaptureError: PyTorch cannot export the model.
        UnsupportedSite: none of what is asked for can be pruned; the message lists why.
    """
    targets = {"mha": mha_sparsity, "channelx1": ffn2_sparsity}
    asked = [
        PruningConfig.of({**kwargs, "pattern": pattern, "target_sparsity": sparsity})
        for pattern, sparsity in targets.items()
        if sparsity
    ]
    sites = _sites_for(bare(model), asked, example_inputs) if asked else []
    return [
        {**config.as_dict(), "op_names": [site.name for site in chosen_sites(config, sites)]}
        for config in asked
    ]


def _sites_for(
    model: nn.Module, configs: Sequence[PruningConfig], example_inputs: Inputs | None
) -> list[Site]:
    """The sites of the kinds that the configs are about."""
    kinds = dict.fromkeys(PATTERNS[config.pattern] for config in configs)
    return training_sites(model, example_inputs, list(kinds))


@dataclass(frozen=True)
class Pruning:
    """The pruners of a model, one for each config, and their hooks at once."""

    pruners: Sequence[MultiheadAttentionPruner]

    def on_step_begin(self, local_step: int = 0) -> None:
        """See `MultiheadAttentionPruner.on_step_begin`."""
        for pruner in self.pruners:
            pruner.on_step_begin(local_step)

    def on_before_optimizer_step(self) -> None:
        """See `MultiheadAttentionPruner.on_before_optimizer_step`."""
        for pruner in self.pruners:
            pruner.on_before_optimizer_step()

    def on_after_optimizer_step(self) -> None:
        """See `MultiheadAttentionPruner.on_after_optimizer_step`."""
        for pruner in self.pruners:
            pruner.on_after_optimizer_step()


def prepare_pruning(
    model: nn.Module,
    configs: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    optimizer: Optimizer | None = None,
    *,
    example_inputs: Inputs | None = None,
) -> Pruning:
    """Put masks on a model, to be set while an ordinary loop trains it.

    The model gets buffers, the masks, the step and the scores (``head_masks/...``); its parameters
    keep their names.  A state dict saved during the run and loaded into a model that was prepared
    alike goes on with the same decisions.

    Args:
        model: changed; in `DistributedDataParallel` or compiled, what is inside.  Or a masked
            program (``fxslim.insert_head_masks(..., trainable=False)``).
        configs: what `parse_auto_slim_config` returned, or dicts with its keys.
        optimizer: its steps call the hooks, so that the loop need not change.  Without one, the
            loop calls those of the result.
        example_inputs: as for `fxslim.capture`.

    Raises:
        ValueError, TypeError: a config makes no sense, or the model was prepared before.
        PlanError: a config names sites that are not there, or two name the same.
        CaptureError: PyTorch cannot export the model.
        UnsupportedSite: none of a kind can be pruned, or one that is named cannot; says why.
    """
    given = [configs] if isinstance(configs, Mapping) else list(configs)
    checked = [PruningConfig.of(config) for config in given]
    if not checked:
        raise ValueError("there is no pruning config: pass what parse_auto_slim_config returned")
    for config in checked:
        config.check_schedule()
    model = bare(model)
    masked = _masked_sites(model)
    sites = masked or _sites_for(model, checked, example_inputs)
    groups = [chosen_sites(config, sites) for config in checked]
    wanted = _disjoint(groups)
    masks = ProgramMasks(model) if masked else HeadMasks(model, wanted, example_inputs).attach_()
    pruners = [
        MultiheadAttentionPruner(config, {s.name: HeadCompression(s, masks) for s in group})
        for config, group in zip(checked, groups, strict=True)
    ]
    pruning = Pruning(pruners)
    if optimizer is not None:
        hook_optimizer_(optimizer, pruning)
    return pruning


def hook_optimizer_(optimizer: Optimizer, pruning: Pruning) -> list[RemovableHandle]:
    """Let the steps of an optimizer call the hooks: the first step begins now.

    Returns:
        What takes the hooks off again.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner  # accelerate's holds the one that steps
    pruning.on_step_begin()

    def before(*_: Any) -> None:
        pruning.on_before_optimizer_step()

    def after(*_: Any) -> None:
        pruning.on_after_optimizer_step()
        pruning.on_step_begin()

    return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


def _masked_sites(model: nn.Module) -> list[Site]:
    """The sites of a masked program; none of anything else.

    Raises:
        ValueError: its masks are parameters, which an optimizer would change.
    """
    sites: list[Site] = meta_of(model).get("sites", [])
    masks = head_masks(model, [site.name for site in sites]) if sites else {}
    if any(mask.requires_grad for mask in masks.values()):
        raise ValueError(
            "the program's head masks are trainable, and pruned heads would come back: make it "
            "with fxslim.insert_head_masks(..., trainable=False)"
        )
    return sites


def _disjoint(groups: Iterable[Iterable[Site]]) -> list[Site]:
    """The sites of all configs."""
    found: dict[str, Site] = {}
    for site in (site for group in groups for site in group):
        if site.name in found:
            raise PlanError(f"two pruning configs name {site.name!r}; exclude it from one of them")
        found[site.name] = site
    return list(found.values())
