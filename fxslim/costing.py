"""Costing: narrow one kind of attention at a time, and see what the whole model costs then."""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fxslim import graph
from fxslim.costs import Costs, Resource
from fxslim.errors import PlanError, UnsupportedSite, check_choice
from fxslim.examples import Inputs, as_inputs
from fxslim.keeping import sites_of
from fxslim.locate import locate_parts
from fxslim.measure import count_flops, count_parameters, interleave
from fxslim.parts import meta_of
from fxslim.placed import Located, Placed
from fxslim.plan import PruningPlan
from fxslim.sites import Site, Unit
from fxslim.steps import narrow
from fxslim.undisturbed import buffers_kept
from fxslim.units import Coupled, couple

__all__ = ["cost"]

Key = tuple[int, int]
"""A kind of attention by its number, and how many units each of that kind keeps."""


def cost(
    program: nn.Module,
    resource: Resource = "flops",
    example_inputs: Inputs | None = None,
    *,
    unit: Unit = "group",
    feed_forward: bool = False,
    points: int = 5,
    seconds: float = 60.0,
    prepare: Callable[[nn.Module], Callable[..., Any]] | None = None,
) -> Costs:
    """What a model costs, by how many heads each attention keeps.

    Parameters and FLOPs are counted on narrow programs, and exact.  A latency is the median time of
    a call of the whole model with all attentions that are alike narrowed, the narrow models called
    in turn; between `points` numbers of heads it is interpolated.

    Args:
        program: what `fxslim.capture` returned.
        resource: "parameters", "flops" or "latency".
        example_inputs: what to call the model with: FLOPs and latency are those of its batch and
            lengths.  Where absent, the small example that the program was captured with.
        unit: what goes at a time, as for `fxslim.plan`.
        feed_forward: count the channels of feed-forward blocks, too, for a plan of both.
        points: at how many numbers of heads latencies are measured.
        seconds: about how long they are measured.
        prepare: makes of a program what is timed; `torch.compile`, for instance.

    Raises:
        ValueError: an unknown resource or unit, too few points, or a latency without weights.
        UnsupportedSite: no attention can be pruned.
    """
    _check(program, resource, unit, points)
    kinds = _kinds(program, unit, feed_forward=feed_forward)
    latency = resource == "latency"
    models = _narrowed(program, kinds, points if latency else 2, every=latency)
    args, kwargs = _arguments(program, example_inputs)
    with buffers_kept(*models.values()):
        if resource == "parameters":
            values = {key: float(count_parameters(model)) for key, model in models.items()}
        elif resource == "flops":
            values = {key: float(_flops(model, args, kwargs)) for key, model in models.items()}
        else:
            ready = {key: prepare(m) if prepare else m for key, m in models.items()}
            calls = {key: functools.partial(model, *args, **kwargs) for key, model in ready.items()}
            values = _medians(calls, seconds)
    dense = values.pop(_DENSE)
    rows: dict[str, list[float]] = {}
    for number, members in enumerate(kinds):
        at = {units: value for (kind, units), value in values.items() if kind == number}
        at[len(members[0].units)] = dense
        row = _row(members[0], at, len(members) if latency else 1)
        rows |= {choice.name: list(row) for choice in members}
    return Costs(resource, unit, dense - sum(row[-1] for row in rows.values()), rows)


_DENSE: Key = (-1, -1)


def _check(program: nn.Module, resource: Resource, unit: Unit, points: int) -> None:
    check_choice("resource", resource, get_args(Resource))
    check_choice("unit", unit, get_args(Unit))
    if points < 2:
        raise ValueError(f"points must be 2 or more, not {points}")
    if resource == "latency" and any(p.is_meta for p in program.parameters()):
        raise ValueError("a model on the meta device has no weights, and so no latency")


# ------------------------------------------------------------------------------------------- kinds


def _kinds(program: nn.Module, unit: Unit, *, feed_forward: bool) -> list[list[Coupled]]:
    """The choices of heads, those together whose graphs are alike."""
    located = locate_parts(program, unit=unit, feed_forward=feed_forward)
    sites = sites_of(located)
    prunable = [site for site in sites if site.prunable]
    if not prunable:
        reasons = "".join(f"\n  {site.name}: {site.reason}" for site in sites)
        raise UnsupportedSite(f"no attention can be pruned{reasons}")
    heads = {(site.name, head): 0.0 for site in prunable for head in range(site.size)}
    found: dict[Any, list[Coupled]] = {}
    for choice in couple(prunable, unit, heads):
        found.setdefault(_signature(choice, located), []).append(choice)
    return list(found.values())


def _signature(choice: Coupled, located: Mapping[str, Located]) -> Any:
    """What narrowing changes, up to names: operators with the shapes of operands and results."""
    names = {site.name for site in choice.sites}
    changed: Counter[Any] = Counter()
    for path, part in located.items():
        mine = [placed for placed in part.placed if placed.site.name in names]
        if mine:
            changed.update((path, _form(node)) for node in _changed(part, mine))
    return len(choice.sites), len(choice.units), frozenset(changed.items())


def _changed(part: Located, some: Sequence[Placed[Site]]) -> set[fx.Node]:
    """The nodes that carry or read the heads, and those that nothing else reads."""
    within = {placed.within for placed in some if placed.within is not None}
    heads = within.union(*(placed.units for placed in some))
    axes = part.axis_map.axes
    carry = {node for node in part.axis_map.dims if axes(node) & heads}
    gone = set(carry)
    for node in reversed(part.axis_map.program.graph.nodes):
        if node.users and set(node.users) <= gone:
            gone.add(node)
    return gone.union(*(node.users for node in carry))


def _form(node: fx.Node) -> Any:
    """A node without its name."""
    tensors = [leaf for n in (node, *node.all_input_nodes) for leaf in _tensors(n)]
    is_parameter = [isinstance(t, nn.Parameter) for t in _tensors(node)]
    return node.op, graph.operator_name(node), tuple(map(graph.shape, tensors)), *is_parameter


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


# ----------------------------------------------------------------------------------------- measure


def _narrowed(
    program: nn.Module, kinds: Sequence[Sequence[Coupled]], points: int, *, every: bool
) -> dict[Key, nn.Module]:
    """The model with one kind of attention narrowed: every one of that kind, or the first.

    With no unit at all, too, unless the attention cannot go.
    """
    models: dict[Key, nn.Module] = {_DENSE: program}
    for kind, members in enumerate(kinds):
        size = len(members[0].units)
        counts = {0, 1, *(round(n * size / (points - 1)) for n in range(points))}
        for units in sorted(counts - {size}):
            some = members if every else members[:1]
            try:
                models[kind, units] = narrow(program, _first(some, units))
            except PlanError:
                if units:
                    raise
    return models


def _first(choices: Sequence[Coupled], units: int) -> PruningPlan:
    """Each of the choices keeps its first units."""
    kept: dict[str, list[int]] = {s.name: [] for choice in choices for s in choice.sites}
    for choice in choices:
        for name, head in (head for unit in choice.units[:units] for head in unit):
            kept[name].append(head)
    return PruningPlan({name: sorted(heads) for name, heads in kept.items()}, 0.0)


def _arguments(program: nn.Module, inputs: Inputs | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments to call with, positional and keyword."""
    if inputs is not None:
        return as_inputs(inputs)
    args, kwargs = meta_of(program)["example_inputs"]
    return args, kwargs


def _flops(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Counted without gradients of any kind.

    PyTorch's counter trips over an output that is a parameter, as what is left of an attention
    without heads can be.
    """
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return count_flops(lambda: functional_call(model, tensors, args, kwargs))


def _medians(calls: Mapping[Key, Callable[[], Any]], seconds: float) -> dict[Key, float]:
    by_name = {str(key): call for key, call in calls.items()}
    times = interleave(by_name, repeats=1000, budget=seconds)
    return {key: statistics.median(times[str(key)]) for key in calls}


def _row(choice: Coupled, at: Mapping[int, float], members: int) -> list[float]:
    """What one attention costs beyond none, by its heads; in between, in proportion."""
    heads = choice.most(choice.sites[0])
    least = at.get(0, at[1])
    known = {heads[units]: value for units, value in {0: least, **at}.items()}
    row = [0.0]
    for low, high in pairwise(sorted(known)):
        start, rise, steps = known[low] - least, known[high] - known[low], high - low
        row += [(start * steps + rise * n) / steps / members for n in range(1, steps + 1)]
    return row
