"""Slimming: a model with masked or zeroed heads becomes a program without them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxslim.compile import compile
from fxslim.examples import Inputs
from fxslim.graph import attribute, set_attribute
from fxslim.locate import find_attention, find_feed_forward
from fxslim.magnitudes import slices
from fxslim.masks import head_masks
from fxslim.partial import captured
from fxslim.parts import each_part, meta_of
from fxslim.passes import RemoveHeadMasks
from fxslim.plan import PruningPlan, with_channels
from fxslim.reading import as_they_are
from fxslim.sites import Site
from fxslim.training_masks import drop_state_, masks_of, multiplied, projections_to_mask
from fxslim.training_sites import bare, check_whole, evaluating

__all__ = ["model_slim"]


def model_slim(model: nn.Module, example_inputs: Inputs | None = None) -> nn.Module:
    """Make a model narrow that was trained with masks, or whose heads another tool has zeroed.

    Masks and gates are multiplied into the weights of the output projections.  A head goes if all
    that these read of it is zero, and so does a channel of a feed-forward block; others stay as
    they are.

    Args:
        model: not changed; in `DistributedDataParallel` or compiled, what is inside.
        example_inputs: as for `fxslim.capture`; where absent, what the model was prepared with.

    Returns:
        A `GraphModule` in eval mode that computes what the model does in eval mode, with
        ``meta["fxslim"]`` a `Report`; see `fxslim.compile`.

    Raises:
        CaptureError: PyTorch cannot export the model.
        UnsupportedSite: no attention can be pruned, or the parameters are sharded.
    """
    model = bare(model)
    check_whole(model)
    with evaluating(model):
        masked, masks = _masks(model)
        with as_they_are(model):
            program = _plain(captured(model, _inputs(model, example_inputs)))
    for site, _, projection in projections_to_mask(masked):
        weight = attribute(program, projection.weight)
        product = multiplied(weight.detach(), site, projection, masks[site.name])
        kind = nn.Parameter(product, requires_grad=weight.requires_grad)
        set_attribute(program, projection.weight, kind)
    attentions = find_attention(program, unit="any")  # of those, whole groups go as groups
    heads, channels = (_plan(program, s) for s in (attentions, find_feed_forward(program)))
    plan = with_channels(heads, channels) if channels.sparsity else heads
    if not (heads.sparsity or channels.sparsity):
        warnings.warn(
            f"fxslim.model_slim: no head of {type(model).__name__} is masked or zero in all of its "
            "output projection, and no channel of a feed-forward block, so none is removed",
            stacklevel=2,
        )
    return compile(program, plan=plan)


def _masks(model: nn.Module) -> tuple[list[Site], dict[str, torch.Tensor]]:
    """The masked sites of a model or of a masked program, and their masks by name."""
    attached = masks_of(model)
    if attached is not None:
        masks = {name: attached.mask(name).detach() for name in attached.sites}
        return list(attached.sites.values()), masks
    sites: list[Site] = meta_of(model).get("sites", [])
    found = head_masks(model, [site.name for site in sites]) if sites else {}
    return sites, {name: mask.detach() for name, mask in found.items()}


def _inputs(model: nn.Module, given: Inputs | None) -> Inputs | None:
    """The inputs that are given, or those that the model was prepared with, where it is now."""
    attached = masks_of(model)
    if given is not None or attached is None:
        return given
    device = next(model.parameters()).device
    inputs: Inputs | None = pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor.to(device), attached.example_inputs
    )
    return inputs


def _plain(program: nn.Module) -> nn.Module:
    """A captured model without head masks in its graph or its state."""

    def remove(_: str, part: fx.GraphModule) -> fx.GraphModule:
        plain: fx.GraphModule = RemoveHeadMasks()(part).graph_module
        return plain

    plain = each_part(program, remove)
    meta_of(plain).pop("sites", None)
    drop_state_(plain)
    return plain


def _plan(program: nn.Module, sites: Sequence[Site]) -> PruningPlan:
    """What stays without heads that are zero."""
    sites = [site for site in sites if site.prunable]
    zero = {site.name: _zero_heads(program, site) for site in sites}
    return PruningPlan.of(_kept(sites, zero), sites)


def _zero_heads(program: nn.Module, site: Site) -> set[int]:
    """The heads of which the output projections read nothing."""
    zero = torch.ones(site.size, dtype=torch.bool)
    for projection in site.summed_by:
        weight = attribute(program, projection.weight).detach()
        zero &= (slices(weight, projection) == 0).all(dim=(1, 2)).cpu()
    return set(zero.nonzero().flatten().tolist())


def _kept(sites: Sequence[Site], zero: dict[str, set[int]]) -> dict[str, list[int]]:
    """The heads that stay: all of a unit, unless all of it is zero in all coupled sites."""
    whole = {s.name: [set(unit) <= zero[s.name] for unit in s.unit] for s in sites}
    kept = {}
    for site in sites:
        places = zip(*(whole[name] for name in (site.name, *site.coupled)), strict=True)
        goes = [all(place) for place in places]
        pairs = zip(site.unit, goes, strict=True)
        kept[site.name] = [head for unit, go in pairs if not go for head in unit]
    return kept
