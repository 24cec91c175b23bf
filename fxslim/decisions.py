"""Decisions: which heads the attentions of a piece of a model keep, made once for their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from fxslim.compile import score
from fxslim.criteria import Criterion
from fxslim.errors import PlanError
from fxslim.passes import InsertHeadMasks
from fxslim.placed import Located
from fxslim.plan import PruningPlan
from fxslim.planning import plan as make_plan
from fxslim.sites import AttentionSite, Site, Unit

__all__ = ["Decisions", "Following", "OneByOne"]

Weights = Mapping[str, torch.Tensor]
"""The parameters and buffers that a piece is called with, by the names that it has for them."""

Decisions = Callable[[Located, Weights], PruningPlan]
"""From the attentions of a piece to the heads that they keep."""


@dataclass(frozen=True)
class Following:
    """Does what a plan of the whole model says.

    Attributes:
        plan: names the sites of the model.
        model: whose names the plan uses, where the piece is that of a submodule.
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
        names = {site.name: self._in_model(site, weights) for site in located.every_site}
        kept = {}
        for site in located.every_site:
            name = names[site.name]
            if name in self.plan.kept:
                kept[site.name] = self.plan.kept[name]
                self.followed.add(name)
            elif site.prunable and isinstance(site, AttentionSite):
                raise PlanError(
                    f"the plan does not say what {name!r} keeps; it names: "
                    f"{', '.join(self.plan.kept) or 'no site'}. Where the graph breaks, a name is "
                    "that below the submodule; pass model=... to have those of the model"
                )
        self._check_whole(weights)
        return PruningPlan(kept, self.plan.sparsity)

    def _check_whole(self, weights: Weights) -> None:
        """Refuse to read matrices of a site that was not seen: it is cut in two."""
        table = self._names()
        matrices = [table.get(id(w), name) for name, w in weights.items() if w.ndim > 1]
        for site in self.plan.kept.keys() - self.followed:
            reads = [name for name in matrices if name.startswith(f"{site}.")]
            if reads:
                raise PlanError(
                    f"the graph reads {reads[0]!r}, but has no attention {site!r}, which the plan "
                    "names: a graph break cuts it in two (torch._dynamo.explain says where)"
                )

    def _in_model(self, site: Site, weights: Weights) -> str:
        """The name that a site has in the model, by those of its weights."""
        if self.model is None:
            return site.name
        own = [p.weight for p in site.projections]
        table = self._names()
        for name in own:
            full = table.get(id(weights[name]), "")
            if full.endswith(f".{name}"):
                above = full.removesuffix(name)
                return above[:-1] if _is_unnamed(site, own) else above + site.name
        return site.name

    def _names(self) -> dict[int, str]:
        return {} if self.model is None else {id(t): name for name, t in _named(self.model)}


def _is_unnamed(site: Site, weights: Sequence[str]) -> bool:
    """Whether the piece is the attention itself, and its name stands for none."""
    return site.name == "attention" and not any(w.startswith("attention.") for w in weights)


def _named(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=True)
    yield from model.named_buffers(remove_duplicate=True)


@dataclass(frozen=True)
class OneByOne:
    """Removes the same share of every attention, by a criterion that needs its weights alone.

    What was decided is remembered as long as the weights live, so it stays the same however
    often a piece is compiled, and whichever piece an attention is met in.
    """

    sparsity: float
    criterion: str | Criterion
    unit: Unit
    min_heads: int
    remembered: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def __call__(self, located: Located, weights: Weights) -> PruningPlan:
        """The heads that stay."""
        kept: dict[str, list[int]] = {}
        undecided = [site for site in located.sites if site.prunable]
        by_name = {site.name: site for site in undecided}
        scores: Mapping[str, torch.Tensor] = {}
        for site in undecided:
            if site.name in kept:
                continue
            together = [site, *(by_name[name] for name in site.coupled)]
            if any(self._memory(s, weights) is None for s in together):
                scores = scores or self._score(located)
                self._remember(together, scores, weights)
            kept |= {s.name: self._memory(s, weights) for s in together}  # type: ignore[misc]
        return PruningPlan.of(kept, located.sites)

    def _score(self, located: Located) -> Mapping[str, torch.Tensor]:
        masked = InsertHeadMasks(located)(located.axis_map.program).graph_module
        return score(masked, self.criterion)

    def _remember(
        self,
        sites: Sequence[AttentionSite],
        scores: Mapping[str, torch.Tensor],
        weights: Weights,
    ) -> None:
        made = make_plan(
            scores,
            sites,
            self.sparsity,
            scope="local",
            unit=self.unit,
            min_heads=self.min_heads,
        )
        for site in sites:
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
