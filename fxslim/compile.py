"""One call: capture, find, mask, score, plan, narrow, verify.  Read `compile` top to bottom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

import torch
from torch import nn

from fxslim.constraints import Constraints
from fxslim.costing import cost
from fxslim.costs import Costs, Resource
from fxslim.criteria import Criterion, LossFn, chosen, default_criterion
from fxslim.errors import UnsupportedSite, check_choice
from fxslim.examples import Inputs
from fxslim.keeping import attentions_of, feed_forwards_of, located_for
from fxslim.locate import locate_parts
from fxslim.partial import captured
from fxslim.parts import meta_of
from fxslim.plan import PruningPlan, with_channels
from fxslim.planning import check_costs, check_target
from fxslim.planning import plan as make_plan
from fxslim.repair import repair as refitted
from fxslim.sites import Site, Unit
from fxslim.steps import Report, mask_located, narrow_located, score
from fxslim.streams import again, first
from fxslim.targets import Scope
from fxslim.verify import verify as check

__all__ = ["check_prunable", "compile"]


@torch.inference_mode(False)
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
    costs: Costs | Resource | None = None,
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
        example_inputs: a tuple (positional), a dict (keyword) or a tensor: what the program that is
            returned is called with, in sizes of its own.  Where absent: the first calibration
            batch, or derived from the model where that is possible.
        criterion: a name in `fxslim.CRITERIA` or an object with a `score` method.  Where absent:
            "compensated_fisher" if there is calibration data and a repair, "output_fisher" without
            a repair, "weight_product" without data.
        calibration: batches in the form of `example_inputs`, some hundred samples of what the model
            is used on, without padding if possible, and without labels unless a loss needs them.
        loss_fn: the loss of a model output, for criteria that need one.
        repair: refit the projections that are left to the dense model (`fxslim.repair`), which
            needs calibration data.  Where absent: if there is such data and no `criterion`.
        plan: a plan to follow exactly, instead of scoring.
        budget: in place of a sparsity: the share of the dense model's cost that may remain.
        costs: what the budget is of: "parameters", "flops" or "latency", counted or measured on
            `example_inputs` by `fxslim.cost`; or what that made.  (Without ``feed_forward=True``
            it counts channels as whole.)  With a sparsity, the plan says what it reaches.
        scope: "global", "local" or "uniform"; see `fxslim.plan`.
        unit: what goes at a time where query heads share a KV head: "group", "query", or "any",
            which repeats keys and values with an index; see `fxslim.plan`.
        min_heads: heads that stay in every site; 0 lets a whole attention go.
        constraints: what else has to hold; see `fxslim.Constraints`.
        ffn_sparsity: the share of the channels of feed-forward blocks to remove as well, in [0, 1),
            by the same criterion, in the same scope.  A budget is met by the heads alone; what
            channels save comes on top.
        rounding: a feed-forward block keeps a multiple of so many channels.
        dynamic: keep batch and sequence lengths symbolic, as far as the model allows.
        verify: compare slim with masked on the example inputs.

    Returns:
        A `GraphModule` called as the model is, with ``meta["fxslim"]`` a `Report`.  Where the model
        as a whole does not export: a copy of it with the submodules that do replaced.  Weights that
        are neither narrowed nor refitted are the model's own tensors: to train either without the
        other, ``copy.deepcopy`` it first.

    Raises:
        ValueError, TypeError: a bad argument, before any work.
        CaptureError: PyTorch cannot export the model.
        PlanError: the budget or the constraints cannot be met.
        UnsupportedSite: no attention can be pruned; the message lists why.
        VerificationError: slim and masked differ by more than rounding.
    """
    check_target(sparsity, scope, unit, min_heads, budget, constraints)
    check_target(ffn_sparsity, scope, unit, rounding)
    if isinstance(costs, str):
        check_choice("costs", costs, get_args(Resource))
    else:
        check_costs(costs, budget, unit)
    batches = None if calibration is None else again(calibration)
    repairing = (batches is not None and criterion is None) if repair is None else repair
    if repairing and batches is None:
        raise ValueError("repair needs calibration batches: pass calibration=[...]")
    if criterion is None:
        criterion = default_criterion(calibrated=batches is not None, repaired=repairing)
    if plan is None:
        chosen(criterion, batches)
    if example_inputs is None and batches is not None:
        example_inputs = first(batches)
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
    masked = mask_located(program, located)
    scores: dict[str, torch.Tensor] = {}
    if plan is None:
        if isinstance(costs, str):
            costs = cost(program, costs, example_inputs, unit=unit, feed_forward=bool(blocks))
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
            plan = with_channels(plan, cut, costs)
    slim = narrow_located(program, located, plan)
    placed = [one for part in located.values() for one in part.placed]
    difference = check(slim, masked, plan, placed) if verify else None
    meta_of(slim)["fxslim"] = Report(plan, sites, scores, difference, feed_forwards=blocks)
    return refitted(slim, program, batches) if repairing and batches is not None else slim


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
