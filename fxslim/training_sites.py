"""Training sites: which attentions of a model can be masked where it is trained.

The masks on the model and those on its program are two ways to say one thing.  That they agree is
tried, not assumed: weights that are read around their attribute, or not as a factor of the context,
give themselves away there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fxslim.capture import without_cache
from fxslim.compile import check_prunable
from fxslim.differences import largest_difference, outputs_of
from fxslim.errors import UnsupportedSite
from fxslim.examples import Inputs
from fxslim.locate import find_attention, find_feed_forward
from fxslim.masks import head_masks
from fxslim.partial import captured
from fxslim.parts import meta_of
from fxslim.sites import AttentionSite, FeedForwardSite, Site
from fxslim.steps import insert_head_masks
from fxslim.training_masks import HeadMasks, masks_of, owner_of
from fxslim.undisturbed import in_eval_mode

__all__ = ["bare", "check_whole", "evaluating", "training_sites"]

_SCALES = (4.0, 64.0, 1024.0)
"""How large masks are made so that their effect on the outputs is no rounding."""


def bare(model: nn.Module) -> nn.Module:
    """The model itself, inside of `DistributedDataParallel` and `torch.compile`."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def check_whole(*modules: nn.Module) -> None:
    """Refuse modules of which this process has a share only.

    Raises:
        UnsupportedSite: a parameter is sharded (FSDP, tensor parallelism).
    """
    if not distributed.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    for module in modules:
        names = [name for name, value in module.named_parameters() if isinstance(value, DTensor)]
        names += [n for n, m in module.named_modules() if isinstance(m, FullyShardedDataParallel)]
        if names:
            raise UnsupportedSite(
                f"{names[0]!r} of {type(module).__name__} is sharded over processes: none of them "
                "has whole heads to score and mask.  Train with DistributedDataParallel, or prune "
                "with fxslim.compile before sharding"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and full precision; after that, each module as it was.

    Accelerate's mixed precision is a wrapper around the model's forward, in place of it.
    """
    wrapper, own = vars(model).get("forward"), vars(model).get("_original_forward")
    try:
        if wrapper is not None and own is not None:
            model.forward = own
        with in_eval_mode(model):
            yield
    finally:
        if wrapper is not None and own is not None:
            model.forward = wrapper


Kinds = Collection[type[AttentionSite] | type[FeedForwardSite]]
"""What to find of a model."""


def training_sites(
    model: nn.Module, example_inputs: Inputs | None = None, kinds: Kinds = (AttentionSite,)
) -> list[Site]:
    """Find the sites of a model, and which of them can be masked on the model itself.

    Args:
        model: not changed.
        example_inputs: as for `fxslim.capture`.
        kinds: attentions, feed-forward blocks or both.

    Returns:
        What `fxslim.find_attention` and `fxslim.find_feed_forward` find; sites where masks on the
        model and on its program differ on the example inputs are not prunable, with the reason.

    Raises:
        UnsupportedSite: the parameters are sharded, or none of a kind can be pruned.
        ValueError: the model has masks already.
    """
    check_whole(model)
    if masks_of(model) is not None:
        raise ValueError(f"{type(model).__name__} has been prepared for pruning already")
    with evaluating(model):
        program = captured(model, example_inputs)
        sites: list[AttentionSite | FeedForwardSite] = []
        for kind in kinds:
            word, find = _KINDS[kind]
            found = find(program)
            check_prunable(found, type(model).__name__, word)
            sites += found
        masked = insert_head_masks(program, sites, trainable=False)
        reasons = _Trial(model, masked, sites).reasons()
    tried: list[Site] = [
        replace(s, prunable=False, reason=reasons[s.name]) if reasons.get(s.name) else s
        for s in sites
    ]
    for kind in kinds:
        own = [site for site in tried if isinstance(site, kind)]
        check_prunable(own, type(model).__name__, _KINDS[kind][0])
    return tried


_KINDS: Mapping[Any, tuple[str, Callable[[nn.Module], Sequence[Any]]]] = {
    AttentionSite: ("attention", find_attention),
    FeedForwardSite: ("feed-forward", find_feed_forward),
}


class _Trial:
    """The model and its masked program, with the same masks."""

    def __init__(self, model: nn.Module, masked: nn.Module, sites: Sequence[Site]) -> None:
        self.model, self.masked = model, masked
        self.sites = {site.name: site for site in sites if site.prunable}
        self.args, self.kwargs = meta_of(masked)["example_inputs"]

    def reasons(self) -> dict[str, str]:
        """Why a site cannot be masked on the model; empty if it can."""
        reasons = {name: self._unowned(site) for name, site in self.sites.items()}
        owned = [site for name, site in self.sites.items() if not reasons[name]]
        if self._on_meta() or not owned:
            return reasons
        masks = HeadMasks(self.model, owned).attach_()
        try:
            whole = self._outputs(self.masked)
            done: dict[str, str] = {}
            for site in owned:
                if site.name not in done:
                    reason = self._disagreement(masks, site, whole)
                    done.update(dict.fromkeys((site.name, *site.coupled), reason))
        finally:
            masks.detach_()
        return reasons | done

    def _on_meta(self) -> bool:
        return any(parameter.is_meta for parameter in self.model.parameters())

    def _unowned(self, site: Site) -> str:
        """Whether an output projection's weight is no parameter of the model."""
        for projection in site.summed_by:
            owner, attribute = owner_of(self.model, projection.weight)
            if attribute not in owner._parameters:
                return f"its output projection's {projection.weight!r} is no parameter of the model"
        return ""

    def _disagreement(self, masks: HeadMasks, site: Site, whole: Sequence[torch.Tensor]) -> str:
        """Mask a site and those coupled to it, on both sides, and compare the outputs."""
        together = {name: self.sites[name] for name in (site.name, *site.coupled)}
        for scale in _SCALES:
            values = _random_masks(together, scale)
            self._set(masks, values)
            expected, got = self._outputs(self.masked), self._outputs(self.model)
            self._set(masks, {name: torch.ones_like(mask) for name, mask in values.items()})
            pairs = [largest_difference(a, b) for a, b in zip(expected, got, strict=True)]
            moved = [largest_difference(a, b) for a, b in zip(expected, whole, strict=True)]
            if any(not found <= allowed for found, allowed in pairs):
                found, allowed = max(pairs, key=lambda pair: pair[0] - pair[1])
                return (
                    "masks on the model and on its program differ on the example inputs by "
                    f"{found:.3g} (rounding allows {allowed:.3g}): the model does not read the "
                    f"weight {site.summed_by[0].weight!r} as an attribute, or not as a plain factor"
                )
            if any(effect > 10 * allowed for effect, allowed in moved):
                return ""
        return "its heads have no effect on the example outputs, so masks cannot be checked"

    def _set(self, masks: HeadMasks, values: Mapping[str, torch.Tensor]) -> None:
        for name, mask in head_masks(self.masked, list(values)).items():
            mask.copy_(values[name])
            masks.mask(name).copy_(values[name])

    def _outputs(self, model: nn.Module) -> list[torch.Tensor]:
        return outputs_of(without_cache(model, self.kwargs), self.args, self.kwargs)


def _random_masks(sites: Mapping[str, Site], scale: float) -> dict[str, torch.Tensor]:
    """Masks in [-scale, scale] that are the same in coupled sites, unit by unit."""
    generator = torch.Generator().manual_seed(0)
    units = max(len(site.unit) for site in sites.values())
    width = max(len(heads) for site in sites.values() for heads in site.unit)
    values = scale * (2 * torch.rand(units, width, generator=generator) - 1)
    masks = {}
    for name, site in sites.items():
        masks[name] = torch.ones(site.size)
        for number, heads in enumerate(site.unit):
            masks[name][list(heads)] = values[number, : len(heads)]
    return masks
