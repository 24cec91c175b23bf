"""One call: capture, find, mask, score, plan, narrow, verify.  Read `compile` top to bottom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxslim.axes import Axis
from fxslim.constraints import Constraints
from fxslim.costs import Costs
from fxslim.criteria import Criterion, LossFn, chosen, default_criterion
from fxslim.errors import PlanError, UnsupportedSite
from fxslim.examples import Inputs
from fxslim.locate import locate_parts
from fxslim.partial import captured
from fxslim.parts import each_part, meta_of
from fxslim.passes import InsertHeadMasks, Narrow
from fxslim.plan import PruningPlan, check_plan
from fxslim.planning import check_target
from fxslim.planning import plan as make_plan
from fxslim.positions import Keep, Uneven
from fxslim.refit import Refitted
from fxslim.repair import repair as refitted
from fxslim.sites import Attention, AttentionSite, Located, Unit
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
    """

    plan: PruningPlan
    sites: list[AttentionSite]
    scores: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)
    max_difference: float | None = None
    refitted: tuple[Refitted, ...] = ()

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
    batches = None if calibration is None else again(calibration)
    repairing = (batches is not None and criterion is None) if repair is None else repair
    if repairing and batches is None:
        raise ValueError("repair needs calibration batches: pass calibration=[...]")
    if criterion is None:
        criterion = default_criterion(calibrated=batches is not None, repaired=repairing)
    if plan is None:
        chosen(criterion, batches)
    program = captured(model, example_inputs, dynamic=dynamic)
    located = _following(program, plan) if plan is not None else locate_parts(program, unit=unit)
    sites = _sites(located)
    check_prunable(sites, type(model).__name__)
    masked = _mask(program, located)
    scores: dict[str, torch.Tensor] = {}
    if plan is None:
        scores = score(masked, criterion, batches, loss_fn)
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
    slim = _narrow(program, located, plan)
    attentions = [a for part in located.values() for a in part.attentions]
    difference = check(slim, masked, plan, attentions) if verify else None
    meta_of(slim)["fxslim"] = Report(plan, sites, scores, difference)
    return refitted(slim, program, batches) if repairing and batches is not None else slim


def insert_head_masks(
    program: nn.Module, sites: Sequence[AttentionSite] | None = None, *, trainable: bool = True
) -> nn.Module:
    """Return `program` with a mask (heads,) at each prunable site, all 1.

    Args:
        program: what `fxslim.capture` returned; not changed.
        sites: which sites to mask; all that are prunable where absent.
        trainable: make the masks parameters rather than buffers.

    Raises:
        UnsupportedSite: a site in `sites` was changed to prunable, or is unknown to the program.
    """
    located = locate_parts(program)
    if sites is not None:
        wanted = {site.name for site in sites if site.prunable}
        unknown = wanted - {site.name for site in _sites(located) if site.prunable}
        if unknown:
            raise UnsupportedSite(f"the program has no prunable site {', '.join(sorted(unknown))}")
        for path, part in located.items():
            chosen = tuple(a for a in part.attentions if a.site.name in wanted)
            located[path] = Located(part.axis_map, chosen)
    return _mask(program, located, trainable=trainable)


def _mask(
    program: nn.Module, located: Mapping[str, Located], *, trainable: bool = True
) -> nn.Module:
    def mask(path: str, part: fx.GraphModule) -> fx.GraphModule:
        return _result(InsertHeadMasks(located[path], trainable)(part))

    masked = each_part(program, mask)
    meta_of(masked)["sites"] = [site for site in _sites(located) if site.prunable]
    return masked


def _sites(located: Mapping[str, Located]) -> list[AttentionSite]:
    return [site for part in located.values() for site in part.sites]


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
    located = _following(program, plan)
    slim = _narrow(program, located, plan)
    meta_of(slim)["fxslim"] = Report(plan, _sites(located))
    return slim


def _following(program: nn.Module, plan: PruningPlan) -> dict[str, Located]:
    """The attentions with the units that the plan needs: single query heads only if it must."""
    located = locate_parts(program)
    try:
        check_plan(plan, _sites(located))
    except PlanError:
        singles = locate_parts(program, unit="any")
        if any(len(unit) == 1 for site in _sites(singles) for unit in site.unit):
            return singles
    return located


def _narrow(program: nn.Module, located: Mapping[str, Located], plan: PruningPlan) -> nn.Module:
    check_plan(plan, _sites(located))

    def narrow_part(path: str, part: fx.GraphModule) -> fx.GraphModule:
        return _result(Narrow(located[path].axis_map, keep_of(located[path], plan))(part))

    return each_part(program, narrow_part)


def _result(result: PassResult) -> fx.GraphModule:
    program: fx.GraphModule = result.graph_module
    return program


def keep_of(located: Located, plan: PruningPlan) -> Keep:
    """The plan in terms of axes: for each axis that narrows, the coordinates that stay."""
    keep: dict[Axis, Sequence[int] | Uneven] = {}
    for attention in located.attentions:
        kept = plan.kept.get(attention.site.name)
        if kept is None or len(kept) == attention.site.num_heads:
            continue
        for axis in dict.fromkeys(attention.units):
            on_axis = [n for n, unit in enumerate(attention.units) if unit is axis]
            keep[axis] = sorted({attention.heads[n][axis] for n in on_axis if n in set(kept)})
        if attention.within is not None:
            keep |= _within_groups(attention, kept)
    return keep


def _within_groups(attention: Attention, kept: Sequence[int]) -> dict[Axis, Uneven]:
    """The query heads that stay in each KV group that stays; nothing if all of them do."""
    group, within = attention.units[0], attention.within
    assert within is not None
    rows: dict[int, list[int]] = {}
    for head in (attention.heads[number] for number in sorted(kept)):
        rows.setdefault(head[group], []).append(head[within])
    whole = all(len(row) == within.size for row in rows.values())
    in_order = {coordinate: sorted(rows[coordinate]) for coordinate in sorted(rows)}
    return {} if whole else {within: Uneven(group, in_order)}


def check_prunable(sites: Sequence[AttentionSite], model: str) -> None:
    """Refuse sites of which none is prunable: never return an unchanged model in silence.

    Raises:
        UnsupportedSite: lists why.
    """
    if not sites:
        raise UnsupportedSite(
            f"{model} has no attention: no softmax or scaled_dot_product_attention over the "
            "product of two projections was found in its graph"
        )
    if not any(site.prunable for site in sites):
        reasons = "\n".join(f"  {site.name}: {site.reason}" for site in sites)
        raise UnsupportedSite(f"{model} has attention, but none of it can be pruned:\n{reasons}")
