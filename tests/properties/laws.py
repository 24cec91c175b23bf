"""What must hold of every program, whatever it looks like."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property

import pytest
import torch
from hypothesis import strategies as st
from torch import fx, nn
from torch.export import ExportedProgram

import fxslim
from fxslim import graph, locate
from fxslim.analysis import AxisMap, analyse
from fxslim.axes import Axis, leaves
from fxslim.plan import check_plan
from fxslim.positions import kept_positions
from fxslim.rules import row_for
from tests.properties.programs import Transformer, build, inputs_of
from tests.properties.specs import Spec
from tests.zoo.reference import Call, compare, without_heads

__all__ = ["Program", "located_once", "plans"]

TOLERANCE = 1e-9
OTHER_SIZES = ((2, 8, 3), (1, 4, 9))


@dataclass
class Program:
    """A captured model with what is true of it; each method is a law."""

    spec: Spec
    model: Transformer = field(init=False)
    program: fx.GraphModule = field(init=False)
    code: str = field(init=False)

    def __post_init__(self) -> None:
        spec = self.spec
        self.model = build(spec)
        inputs = inputs_of(spec, spec.batch, spec.length, spec.memory)
        with nullcontext() if spec.dynamic else already_functional():
            self.program = fxslim.capture(self.model, inputs, dynamic=spec.dynamic)
        self.code = self.program.code
        sizes = [(spec.batch, spec.length, spec.memory), *(OTHER_SIZES if spec.dynamic else ())]
        self.calls = [Call((), inputs_of(spec, *size)) for size in sizes]

    @cached_property
    def sites(self) -> list[fxslim.AttentionSite]:
        return fxslim.find_attention(self.program)

    @cached_property
    def prunable(self) -> list[fxslim.AttentionSite]:
        return [site for site in self.sites if site.prunable]

    @cached_property
    def path(self) -> dict[str, str]:
        """The path of the attention's module, by the name of the site."""
        truth = self.spec.truth()
        return {site.name: t.path for site, t in zip(self.sites, truth, strict=True)}

    @cached_property
    def counted(self) -> bool:
        """Whether the sites have all the heads that the model has.

        Of layers that share a weight, one's heads may be channels of the other's: these may be
        reported together.
        """
        truth = self.spec.truth()
        return all(s.num_heads == t.spec.heads for s, t in zip(self.sites, truth, strict=True))

    # ---------------------------------------------------------------------------------- the laws

    def capture_computes_the_model(self) -> None:
        self.same(self.program, self.model)

    def every_attention_is_found_and_nothing_else(self) -> None:
        truth = self.spec.truth()
        inner = {True: ".inner", False: ""}
        expected = [t.path + inner[t.spec.projection == "module"] + t.call for t in truth]
        assert [site.name for site in self.sites] == expected
        for site, t in zip(self.sites, truth, strict=True):
            assert site.prunable == t.separable or t.separable is None, site
            assert site.is_cross == (t.spec.source != "self"), site.name
            if t.separable:
                assert site.num_heads == t.spec.heads, site
                assert site.query, site
                assert site.output, site
                assert site.num_kv_heads == t.spec.kv_heads, site
                if t.spec.kv_heads > 1:  # one head for all is no head axis of the weight
                    assert site.key, site
                    assert site.value, site

    def coupled_heads_are_refused(self) -> None:
        for site in self.sites:
            if not site.prunable:
                assert site.reason
                plan = fxslim.PruningPlan({site.name: []}, 1.0)
                with pytest.raises(fxslim.UnsupportedSite) as caught:
                    fxslim.narrow(self.program, plan)
                assert site.reason in str(caught.value)

    def only_shared_weights_couple_sites(self) -> None:
        for site in self.prunable:
            twins = {s.name for s in self.prunable if self.path[s.name] == self.path[site.name]}
            assert twins <= {site.name, *site.coupled}
            if self.spec.tied == "none":
                assert twins == {site.name, *site.coupled}

    def slim_equals_masked(self, plan: fxslim.PruningPlan) -> None:
        slim = fxslim.narrow(self.program, plan)
        if self.counted:
            self.same(slim, self.model.without(self.by_path(plan.kept)))
        self.same(slim, without_heads(self.model, self.sites, plan.kept))
        fxslim.verify(slim, fxslim.insert_head_masks(self.program), plan)

    def two_steps_equal_one(self, first: fxslim.PruningPlan, data: st.DataObject) -> None:
        once = fxslim.narrow(self.program, first)
        sites = fxslim.find_attention(once)
        names = [site.name for site in sites]
        left = {s.name: in_order(s, first.kept.get(s.name, range(s.num_heads))) for s in self.sites}
        assert names == [site.name for site in self.sites if left[site.name]], first
        second = data.draw(plans([site for site in sites if site.prunable]), label="second plan")
        twice = fxslim.narrow(once, second)
        others = {site.name for site in sites if site.num_heads != len(left[site.name])}
        if others:  # of a site that was refused, the heads may not have been known
            assert not (self.spec.fits() and others & {s.name for s in self.prunable}), first
            fxslim.verify(twice, fxslim.insert_head_masks(once), second)
            return
        kept = dict(first.kept)
        for name, heads in second.kept.items():
            kept[name] = [left[name][h] for h in heads]
        if self.counted:
            self.same(twice, self.model.without(self.by_path(kept)))
        both = fxslim.PruningPlan(kept, 0.0)
        if self.in_one_step(both):
            direct = fxslim.narrow(self.program, both)
            self.same(twice, direct)
            if all(kept.values()):  # else dead rows of a fused weight may stay
                assert shapes(twice) == shapes(direct)

    def an_empty_plan_changes_nothing(self) -> None:
        everything = {site.name: list(range(site.num_heads)) for site in self.sites}
        slim = fxslim.narrow(self.program, fxslim.PruningPlan(everything, 0.0))
        assert slim.code == self.program.code
        owned = dict(self.program.named_parameters())
        for name, parameter in slim.named_parameters():  # those that no node reads are gone
            assert parameter is owned[name], name

    def permuting_a_free_axis_changes_nothing(self, data: st.DataObject) -> None:
        """Heads, but also head dims and channels: an axis that nobody reads as a whole."""
        axis_map = analyse(self.program)
        order = {
            axis: data.draw(st.permutations(range(axis.size)), label=f"order of {axis}")
            for axis in free_axes(axis_map)
        }
        self.same(permuted(axis_map, order), self.model)

    def no_step_changes_the_program(self) -> None:
        assert self.program.code == self.code

    # --------------------------------------------------------------------------------- their parts

    def same(self, ours: nn.Module, theirs: nn.Module) -> None:
        """Both give the same outputs, at all sizes."""
        for call in self.calls:
            difference = compare(call.on(ours), call.on(theirs))
            assert difference.relative < TOLERANCE, difference

    def by_path(self, kept: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
        return {self.path[name]: heads for name, heads in kept.items()}

    def in_one_step(self, plan: fxslim.PruningPlan) -> bool:
        """Whether the plan fits the whole model: what is left of a unit may be parted, say.

        A layer may be refused until what shares its weight has become narrow.
        """
        if self.spec.tied == "none":
            return self.in_units(plan.kept)
        try:
            check_plan(plan, self.sites)
        except (fxslim.PlanError, fxslim.UnsupportedSite):
            return False
        return True

    def in_units(self, kept: Mapping[str, Sequence[int]]) -> bool:
        """Whether whole units go, or as many heads of each that stays."""
        for site in self.prunable:
            left = [len(set(unit) & set(kept.get(site.name, unit))) for unit in site.unit]
            if not site.uneven and any(
                0 < n < len(u) for n, u in zip(left, site.unit, strict=True)
            ):
                return False
            if len(set(left) - {0}) > 1:
                return False
        return True


def in_order(site: fxslim.AttentionSite, kept: Sequence[int]) -> list[int]:
    """The heads that are left as the slim program numbers them: a tile has one of each group."""
    rows = [row for unit in site.unit if (row := [h for h in unit if h in kept])]
    tiled = site.uneven and len(site.unit) > 1 and site.unit[0][-1] > site.unit[1][0]
    return [head for tile in zip(*rows, strict=True) for head in tile] if tiled else sorted(kept)


@contextmanager
def already_functional() -> Iterator[None]:
    """Skip the half of a capture that makes a graph functional: these models are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExportedProgram, "run_decompositions", lambda self, table: self)
        yield


@contextmanager
def located_once() -> Iterator[None]:
    """Look for the attentions of a program once: the laws ask for them twenty times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locate, "_attentions", cache(locate._attentions))
        yield


@st.composite
def plans(draw, sites: Sequence[fxslim.AttentionSite], *, least: int = 0) -> fxslim.PruningPlan:
    """Any plan that fits: units, or as many heads of each; the same where sites are coupled."""
    kept: dict[str, list[int]] = {}
    by_name = {site.name: site for site in sites}
    for site in sites:
        if site.name in kept:
            continue
        numbers = range(len(site.unit))
        amount = draw(st.sampled_from(sorted({least, 1, len(numbers) - 1, len(numbers)})))
        chosen = draw(st.permutations(numbers))[:amount]
        together = [by_name[name] for name in (site.name, *site.coupled)]
        widths = {len(unit) for other in together for unit in other.unit}
        places = {n: range(max(widths)) for n in chosen}
        if len(widths) == 1 and all(other.uneven for other in together) and draw(st.booleans()):
            count = draw(st.integers(1, *widths))
            places = {n: draw(st.permutations(places[n]))[:count] for n in chosen}
        for other in together:
            stay = (h for n in chosen for i, h in enumerate(other.unit[n]) if i in places[n])
            kept[other.name] = sorted(stay)
    heads = sum(site.num_heads for site in sites)
    return fxslim.PruningPlan(kept, 1 - sum(map(len, kept.values())) / max(heads, 1))


def shapes(program: fx.GraphModule) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in program.named_parameters()}


def free_axes(axis_map: AxisMap) -> list[Axis]:
    """Free axes of parameters, without those whose positions a creation operator numbers."""
    numbered = set()
    for node in axis_map.dims:
        row = row_for(node) if node.op == "call_function" else None
        if row is not None and row.by_position:
            numbered |= axis_map.axes(node)
    found: dict[Axis, None] = {}
    for node, results in axis_map.dims.items():
        if node.op == "get_attr":
            found.update((leaf, None) for dims in results for dim in dims for leaf in leaves(dim))
    return [axis for axis in found if not axis.block and axis not in numbered]


def permuted(axis_map: AxisMap, order: Mapping[Axis, Sequence[int]]) -> fx.GraphModule:
    """The program with every tensor reordered along the axes."""
    program = axis_map.program
    made = fx.GraphModule(program, program.graph)
    done: dict[int, torch.Tensor] = {}
    for node in axis_map.dims:
        if node.op != "get_attr":
            continue
        old = graph.attribute(program, str(node.target))
        if id(old) not in done:
            value = old.detach()
            for position, dim in enumerate(axis_map.of(node)):
                value = value.index_select(position, torch.tensor(kept_positions(dim, order)))
            done[id(old)] = nn.Parameter(value) if isinstance(old, nn.Parameter) else value
        graph.set_attribute(made, str(node.target), done[id(old)])
    return made
