"""One call: capture, find, mask, score, plan, narrow, verify.  Read `compile` top to bottom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxslim.constraints import Constraints
from fxslim.costs import Costs
from fxslim.criteria import Criterion, LossFn, chosen, default_criterion
from fxslim.errors import UnsupportedSite
from fxslim.examples import Inputs
from fxslim.keeping import attentions_of, feed_forwards_of, keep_of, located_for, sites_of
from fxslim.locate import locate_parts
from fxslim.partial import captured
from fxslim.parts import each_part, meta_of
from fxslim.passes import InsertHeadMasks, Narrow
from fxslim.placed import Located
from fxslim.plan import PruningPlan, check_plan, with_channels
from fxslim.planning import check_target
from fxslim.planning import plan as make_plan
from fxslim.refit import Refitted
from fxslim.repair import repair as refitted
from fxslim.sites import AttentionSite, FeedForwardSite, Site, Unit
from fxslim.streams import again
from fxslim.targets import Scope
from fxslim.verify import verify as check

__all__ = ["Report", "check_prunable", "compile", "insert_head_masks", "narrow", "score"]


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


def compile(
    model: nn.Module,
    sparsity: float | None = None,
    example_inputs: Inputs | None = None,
    *,
    criterion: str | Criterion | None = None,
    calibration: Iterable[Inputs] | None = None,
    loss_fn: LossFn | None = None,
    repair: bool | None = None,
    plan: PruningPlan | None = None,
    budget: float | None = None,
    costs: Costs | None = None,
    scope: Scope = "global",
    unit: Unit = "group",
    min_heads: int = 1,
    constraints: Constraints | None = None,
    ffn_sparsity: float = 0.0,
    rounding: int = 1,
    dynamic: bool = True,
    verify: bool = True,
) -> nn.Module:
    """Remove attention heads from `model` and return a narrower program that computes the rest.

    Args:
        model: any `nn.Module`; a program that `capture` made is taken as it is.  Not changed.
        sparsity: the share of prunable heads to remove, in [0, 1); never more.  0.5, if there is no
            budget.
        example_inputs: a tuple (positional), a dict (keyword) or a tensor; derived where possible.
        criterion: a name in `fxslim.CRITERIA` or an object with a `score` method.  Where absent:
            "compensated_fisher" if there is calibration data and a repair, "output_fisher" without
            a repair, "weight_product" without data.
        calibration: batches in the form of `example_inputs`, some hundred samples of what the model
            is used on, without padding if possible.
        loss_fn: the loss of a model output, for criteria that need one.
        repair: refit the projections that are left to the dense model (`fxslim.repair`), which
            needs calibration data.  Where absent: if there is such data and no `criterion`.
        plan: a plan to follow exactly, instead of scoring.
        budget: in place of a sparsity: the share of the dense model's cost that may remain.
        costs: what each site costs, for a budget; `fxslim.cost` makes them.
        scope: "global", "local" or "uniform"; see `fxslim.plan`.
        unit: what goes at a time where query heads share a KV head: "group", "query", or "any",
            which repeats keys and values with an index; see `fxslim.plan`.
        min_heads: heads that stay in every site; 0 lets a whole attention go.
        constraints: what else has to hold; see `fxslim.Constraints`.
        ffn_sparsity: the share of the channels of feed-forward blocks to remove as well, in [0, 1),
            by the same criterion, in the same scope.
        rounding: a feed-forward block keeps a multiple of so many channels.
        dynamic: keep batch and sequence lengths symbolic, as far as the model allows.
        verify: compare slim with masked on the example inputs.

    Returns:
        A `GraphModule` called as the model is, with ``meta["fxslim"]`` a `Report`.  Where the model
        as a whole does not export: a copy of it with the submodules that do replaced.

    Raises:
        ValueError, TypeError: a bad argument, before any work.
        CaptureError: PyTorch cannot export the model.
        PlanError: the budget or the constraints cannot be met.
        UnsupportedSite: no attention can be pruned; the message lists why.
        VerificationError: slim and masked differ by more than rounding.
    """
    check_target(sparsity, scope, unit, min_heads, budget, costs, constraints)
    check_target(ffn_sparsity, scope, unit, rounding)
    batches = None if calibration is None else again(calibration)
    repairing = (batches is not None and criterion is None) if repair is None else repair
    if repairing and batches is None:
        raise ValueError("repair needs calibration batches: pass calibration=[...]")
    if criterion is None:
        criterion = default_criterion(calibrated=batches is not None, repaired=repairing)
    if plan is None:
        chosen(criterion, batches)
    program = captured(model, example_inputs, dynamic=dynamic)
    if plan is None:
        located = locate_parts(program, unit=unit, feed_forward=ffn_sparsity > 0)
    else:
        located = located_for(program, plan)
    sites, blocks = attentions_of(located), feed_forwards_of(located)
    if blocks or ffn_sparsity:
        check_prunable(blocks, type(model).__name__, "feed-forward")
    channels_only = bool(blocks) and (sparsity == 0 or plan is not None)
    if not channels_only:
        check_prunable(sites, type(model).__name__)
    masked = _mask(program, located)
    scores: dict[str, torch.Tensor] = {}
    if plan is None:
        scores = score(masked, criterion, batches, loss_fn)
        plan = PruningPlan({}, 0.0)
        if not channels_only:
            plan = make_plan(
                scores,
                sites,
                sparsity,
                budget=budget,
                costs=costs,
                scope=scope,
                unit=unit,
                min_heads=min_heads,
                constraints=constraints,
            )
        if blocks:
            whole = Constraints(multiple_of=rounding)
            cut = make_plan(scores, blocks, ffn_sparsity, scope=scope, constraints=whole)
            plan = with_channels(plan, cut)
    slim = _narrow(program, located, plan)
    placed = [one for part in located.values() for one in part.placed]
    difference = check(slim, masked, plan, placed) if verify else None
    meta_of(slim)["fxslim"] = Report(plan, sites, scores, difference, feed_forwards=blocks)
    return refitted(slim, program, batches) if repairing and batches is not None else slim


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
    return _mask(program, located, trainable=trainable)


def _mask(
    program: nn.Module, located: Mapping[str, Located], *, trainable: bool = True
) -> nn.Module:
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
    return found.score(masked, meta_of(masked)["sites"], calibration, loss_fn)


def narrow(program: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return `program` without the heads that `plan` leaves out; `program` is not changed.

    Raises:
        PlanError: the plan does not fit the program's sites.
        UnsupportedSite: the plan removes heads of a site that is not prunable.
    """
    located = located_for(program, plan)
    slim = _narrow(program, located, plan)
    meta_of(slim)["fxslim"] = Report(
        plan, attentions_of(located), feed_forwards=feed_forwards_of(located)
    )
    return slim


def _narrow(program: nn.Module, located: Mapping[str, Located], plan: PruningPlan) -> nn.Module:
    check_plan(plan, sites_of(located))

    def narrow_part(path: str, part: fx.GraphModule) -> fx.GraphModule:
        return _result(Narrow(located[path].axis_map, keep_of(located[path], plan))(part))

    return each_part(program, narrow_part)


def _result(result: PassResult) -> fx.GraphModule:
    program: fx.GraphModule = result.graph_module
    return program


def check_prunable(sites: Sequence[Site], model: str, kind: str = "attention") -> None:
    """Refuse sites of which none is prunable: never return an unchanged model in silence.

    Raises:
        UnsupportedSite: lists why.
    """
    if not sites:
        raise UnsupportedSite(f"{model} has no {kind}: {_LOOKED_FOR[kind]} was found in its graph")
    if not any(site.prunable for site in sites):
        reasons = "\n".join(f"  {site.name}: {site.reason}" for site in sites)
        raise UnsupportedSite(f"{model} has {kind}, but none of it can be pruned:\n{reasons}")


_LOOKED_FOR = {
    "attention": "no softmax or scaled_dot_product_attention over the product of two projections",
    "feed-forward": "no channels between projections that read and write one stream",
}
