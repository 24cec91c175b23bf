"""Decisions: which heads the attentions of a piece of a model keep, made once for all pieces."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fxslim.criteria import Criterion
from fxslim.dynamo import running_call
from fxslim.errors import CaptureError, PlanError
from fxslim.graph import attribute, set_attribute
from fxslim.keeping import keep_of, located_for
from fxslim.locate import find_attention
from fxslim.passes import InsertHeadMasks, Narrow
from fxslim.passes.narrow import Selections, selections_of
from fxslim.placed import Located
from fxslim.plan import PruningPlan, check_plan
from fxslim.planning import plan as make_plan
from fxslim.sites import AttentionSite, Site, Unit
from fxslim.steps import insert_head_masks, score

__all__ = ["AtFirstSight", "Decisions", "Following", "narrowed_by"]

Weights = Mapping[str, torch.Tensor]
"""The parameters and buffers that a piece is called with, by the names that it has for them."""

Decisions = Callable[[Located, Weights], PruningPlan]
"""From the attentions of a piece to the heads that they keep."""


def narrowed_by(
    decide: Decisions, located: Located, weights: Weights
) -> tuple[fx.GraphModule, dict[str, Selections]]:
    """A piece without the heads that go, and what stays of each of its weights that narrows.

    Raises:
        PlanError, UnsupportedSite: what was decided does not fit the piece.
    """
    program = located.axis_map.program
    for name, tensor in weights.items():
        set_attribute(program, name, tensor)
    plan = decide(located, weights)
    (located,) = located_for(program, plan).values()
    check_plan(plan, located.every_site)
    keep = keep_of(located, plan)
    slim = Narrow(located.axis_map, keep)(program).graph_module
    return slim, selections_of(located.axis_map, keep)


@dataclass(frozen=True)
class Following:
    """Does what a plan of the whole model says.

    Attributes:
        plan: names the sites of the model.
        model: whose names the plan uses, where the piece is that of a submodule; where absent, the
            module whose call is being compiled.
        followed: the sites that were seen.
    """

    plan: PruningPlan
    model: nn.Module | None = None
    followed: set[str] = field(default_factory=set)

    def __call__(self, located: Located, weights: Weights) -> PruningPlan:
        """The heads that the plan keeps, under the names of the piece.

        Raises:
            PlanError: it does not say what an attention keeps, or reads one's weights without it.
        """
        table = self._names()
        kept = {}
        for site in located.every_site:
            name = _in_model(site, weights, table)
            if name in self.plan.kept:
                kept[site.name] = self.plan.kept[name]
                self.followed.add(name)
            elif site.prunable and isinstance(site, AttentionSite):
                raise PlanError(
                    f"the plan does not say what {name!r} keeps; it names: "
                    f"{', '.join(self.plan.kept) or 'no site'}. Where a function is compiled and "
                    "its graph breaks, a name is that below the submodule; pass model=... to have "
                    "those of the model"
                )
        self._check_whole([table.get(id(w), name) for name, w in weights.items() if w.ndim > 1])
        return PruningPlan(kept, self.plan.sparsity)

    def _check_whole(self, matrices: Sequence[str]) -> None:
        """Refuse to read matrices of a site that was not seen: it is cut in two."""
        for site in self.plan.kept.keys() - self.followed:
            reads = [name for name in matrices if name.startswith(f"{site}.")]
            if reads:
                raise PlanError(
                    f"the graph reads {reads[0]!r}, but has no attention {site!r}, which the plan "
                    "names: a graph break cuts it in two (torch._dynamo.explain says where)"
                )

    def _names(self) -> dict[int, str]:
        """The names that the model has for its parameters and buffers."""
        call = running_call() if self.model is None else None
        model = self.model if call is None else call.model
        return {} if model is None else {id(t): name for name, t in _named(model)}


def _in_model(site: Site, weights: Weights, table: Mapping[int, str]) -> str:
    """The name that a site has in the model, by those of its weights."""
    own = [p.weight for p in site.projections]
    for name in own:
        full = table.get(id(weights[name]), "")
        if full.endswith(f".{name}"):
            above = full.removesuffix(name)
            return above[:-1] if _is_unnamed(site, own) else above + site.name
    return site.name


def _is_unnamed(site: Site, weights: Sequence[str]) -> bool:
    """Whether the piece is the attention itself, and its name stands for none."""
    return site.name == "attention" and not any(w.startswith("attention.") for w in weights)


def _named(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=True)
    yield from model.named_buffers(remove_duplicate=True)


@dataclass(frozen=True)
class AtFirstSight:
    """Plans for the whole model when the first of its graphs arrives, by weights alone.

    The model is the module whose call is being compiled; it is captured with the inputs of that
    call, unless the graph is all of it.  Where there is none (a function is compiled) or it cannot
    be captured, the attentions of a graph are planned for by themselves.  `decide_for` plans for a
    model beforehand.

    What was decided is remembered as long as the weights live, so it stays the same however often a
    piece is compiled, and whichever piece an attention is met in.
    """

    sparsity: float
    criterion: str | Criterion
    unit: Unit
    min_heads: int
    remembered: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    met: WeakSet[nn.Module] = field(default_factory=WeakSet)

    def __call__(self, located: Located, weights: Weights) -> PruningPlan:
        """The heads that stay."""
        if self._undecided(located.sites, weights):
            self._decide_for_the_model(weights)
        if self._undecided(located.sites, weights):
            program = located.axis_map.program
            masked = InsertHeadMasks(located)(program).graph_module
            self._decide(located.sites, score(masked, self.criterion), weights)
        prunable = (site for site in located.sites if site.prunable)
        kept = {site.name: self._memory(site, weights) or [] for site in prunable}
        return PruningPlan.of(kept, located.sites)

    def _decide_for_the_model(self, weights: Weights) -> None:
        """Decide for all attentions of the model that is running, unless that was done before."""
        call = running_call()
        if call is None or call.model in self.met:
            return
        self.met.add(call.model)
        read = set(map(id, weights.values()))
        if all(id(parameter) in read for parameter in call.model.parameters()):
            return  # the graph is the model
        try:
            program = call.captured()
        except CaptureError as error:
            warnings.warn(
                "fxslim.backend: the attentions of each graph are compared with each other only, "
                f"because the model could not be captured: {error}",
                stacklevel=4,
            )
            return
        self.decide_for(program)

    def decide_for(self, program: nn.Module) -> list[AttentionSite]:
        """Decide for what is not remembered of a captured model; all attentions that it has."""
        sites = find_attention(program, unit=self.unit)
        outputs = [p.weight for site in sites for p in site.output]
        weights = {name: attribute(program, name) for name in outputs}
        if self._undecided(sites, weights):
            scores = score(insert_head_masks(program, sites), self.criterion)
            self._decide(sites, scores, weights)
        return sites

    def _undecided(self, sites: Sequence[AttentionSite], weights: Weights) -> list[AttentionSite]:
        """The prunable sites of which nothing is remembered, and those that go with them."""
        new = {s.name for s in sites if s.prunable and self._memory(s, weights) is None}
        return [s for s in sites if s.prunable and not new.isdisjoint({s.name, *s.coupled})]

    def _decide(
        self,
        sites: Sequence[AttentionSite],
        scores: Mapping[str, torch.Tensor],
        weights: Weights,
    ) -> None:
        new = self._undecided(sites, weights)
        made = make_plan(scores, new, self.sparsity, unit=self.unit, min_heads=self.min_heads)
        for site in new:
            weight, place = _key(site, weights)
            known: dict[Any, list[int]] = self.remembered.setdefault(weight, {})  # type: ignore[no-untyped-call]
            known[place] = made.kept[site.name]

    def _memory(self, site: AttentionSite, weights: Weights) -> list[int] | None:
        weight, place = _key(site, weights)
        found: dict[Any, list[int]] = self.remembered.get(weight, {})  # type: ignore[no-untyped-call]
        return found.get(place)


def _key(site: AttentionSite, weights: Weights) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What identifies an attention: its first output projection, and where its heads are there."""
    output = site.output[0]
    return weights[output.weight], (output.dim, *output.index.flatten().tolist())
