"""The steps that `fxslim.compile` is made of: mask, score, narrow; and the report of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxslim.criteria import Criterion, LossFn, chosen
from fxslim.errors import UnsupportedSite
from fxslim.examples import Inputs
from fxslim.keeping import attentions_of, feed_forwards_of, keep_of, located_for, sites_of
from fxslim.locate import locate_parts
from fxslim.parts import each_part, meta_of
from fxslim.passes import InsertHeadMasks, Narrow
from fxslim.placed import Located
from fxslim.plan import PruningPlan, check_plan
from fxslim.refit import Refitted
from fxslim.sites import AttentionSite, FeedForwardSite, Site
from fxslim.undisturbed import buffers_kept

__all__ = ["Report", "insert_head_masks", "mask_located", "narrow", "narrow_located", "score"]


@dataclass(frozen=True)
class Report:
    """What was done, and to what: ``slim.meta["fxslim"]``.

    Attributes:
        plan: which heads each site kept.
        sites: every attention that was found, refused ones too.
        scores: the scores of the prunable sites' heads, where a criterion made them.
        max_difference: the largest difference of slim and masked on the example inputs; None if it
            was not measured.  Before the repair, if there was one.
        refitted: the weights that a repair changed, in the order of the graph.
        feed_forwards: every feed-forward block, refused ones too, where channels were to go.
    """

    plan: PruningPlan
    sites: list[AttentionSite]
    scores: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)
    max_difference: float | None = None
    refitted: tuple[Refitted, ...] = ()
    feed_forwards: list[FeedForwardSite] = field(default_factory=list)

    @classmethod
    def of(cls, slim: nn.Module) -> Report:
        """The report of a slim model.

        Raises:
            ValueError: the module has none.
        """
        report = meta_of(slim).get("fxslim")
        if not isinstance(report, cls):
            raise ValueError(f"{type(slim).__name__} is not what fxslim.compile returned")
        return report


def insert_head_masks(
    program: nn.Module, sites: Sequence[Site] | None = None, *, trainable: bool = True
) -> nn.Module:
    """Return `program` with a mask (heads,) at each prunable site, all 1.

    Args:
        program: what `fxslim.capture` returned; not changed.
        sites: which sites to mask, feed-forward blocks among them; where absent, all attentions
            that are prunable.
        trainable: make the masks parameters rather than buffers.

    Raises:
        UnsupportedSite: a site in `sites` was changed to prunable, or is unknown to the program.
    """
    blocks = any(isinstance(site, FeedForwardSite) for site in sites or ())
    located = locate_parts(program, feed_forward=blocks)
    if sites is not None:
        wanted = {site.name for site in sites if site.prunable}
        unknown = wanted - {site.name for site in sites_of(located) if site.prunable}
        if unknown:
            raise UnsupportedSite(f"the program has no prunable site {', '.join(sorted(unknown))}")
        for path, part in located.items():
            attentions = tuple(a for a in part.attentions if a.site.name in wanted)
            feed_forwards = tuple(f for f in part.feed_forwards if f.site.name in wanted)
            located[path] = Located(part.axis_map, attentions, feed_forwards)
    return mask_located(program, located, trainable=trainable)


def mask_located(
    program: nn.Module, located: Mapping[str, Located], *, trainable: bool = True
) -> nn.Module:
    """Mask every site that was located and is prunable; see `insert_head_masks`."""

    def mask(path: str, part: fx.GraphModule) -> fx.GraphModule:
        return _result(InsertHeadMasks(located[path], trainable)(part))

    masked = each_part(program, mask)
    meta_of(masked)["sites"] = [site for site in sites_of(located) if site.prunable]
    return masked


def score(
    masked: nn.Module,
    criterion: str | Criterion = "weight_product",
    calibration: Iterable[Inputs] | None = None,
    loss_fn: LossFn | None = None,
) -> dict[str, torch.Tensor]:
    """Score the heads of a masked program.

    Args:
        masked: what `insert_head_masks` returned.
        criterion: a name in `fxslim.CRITERIA` or an object with a `score` method.
        calibration: batches of inputs, for criteria that need data.
        loss_fn: the loss of a model output, for criteria that need gradients; `output.loss` where
            absent.

    Returns:
        For each prunable site by name, a tensor (heads,); higher matters more.

    Raises:
        ValueError: an unknown criterion, or calibration data is missing.
    """
    found = chosen(criterion, calibration)
    with torch.inference_mode(False), torch.enable_grad(), buffers_kept(masked):
        return found.score(masked, meta_of(masked)["sites"], calibration, loss_fn)


def narrow(program: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return `program` without the heads that `plan` leaves out; `program` is not changed.

    Raises:
        PlanError: the plan does not fit the program's sites.
        UnsupportedSite: the plan removes heads of a site that is not prunable.
    """
    located = located_for(program, plan)
    slim = narrow_located(program, located, plan)
    meta_of(slim)["fxslim"] = Report(
        plan, attentions_of(located), feed_forwards=feed_forwards_of(located)
    )
    return slim


def narrow_located(
    program: nn.Module, located: Mapping[str, Located], plan: PruningPlan
) -> nn.Module:
    """Narrow what was located for the plan; see `narrow`."""
    check_plan(plan, sites_of(located))

    def narrow_part(path: str, part: fx.GraphModule) -> fx.GraphModule:
        return _result(Narrow(located[path].axis_map, keep_of(located[path], plan))(part))

    return each_part(program, narrow_part)


def _result(result: PassResult) -> fx.GraphModule:
    program: fx.GraphModule = result.graph_module
    return program
