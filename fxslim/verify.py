"""Verify: the slim program against the masked one, on real inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxslim.differences import largest_difference, outputs_of
from fxslim.errors import VerificationError
from fxslim.examples import Inputs, as_inputs
from fxslim.masks import head_masks, restored, set_masks
from fxslim.parts import each_part, parts_of
from fxslim.placed import Placed
from fxslim.plan import PruningPlan
from fxslim.program import flat_inputs
from fxslim.sites import Site
from fxslim.undisturbed import buffers_kept, seeded

__all__ = ["verify"]

_Given = tuple[tuple[Any, ...], dict[str, Any]]


def verify(
    slim: nn.Module,
    masked: nn.Module,
    plan: PruningPlan,
    placed: Sequence[Placed[Site]] = (),
    inputs: Inputs | None = None,
) -> float | None:
    """Compare slim and masked on `inputs`, or on the example that the program was captured with.

    Returns:
        The largest absolute difference over all outputs; None if the weights are on `meta`.

    Raises:
        VerificationError: they differ by more than rounding; names the first site that does.
    """
    if any(parameter.is_meta for parameter in slim.parameters()):
        return None
    if inputs is not None:
        pairs = [(slim, masked, as_inputs(inputs))]
    else:
        parts = zip(parts_of(slim).values(), parts_of(masked).values(), strict=True)
        pairs = [(part, other, other.meta["example_inputs"]) for part, other in parts]
    with restored(head_masks(masked, list(plan.kept)).values()):
        set_masks(masked, plan.kept)
        return max(
            _compare(_quiet(one), _quiet(other), given, placed) for one, other, given in pairs
        )


def _compare(
    slim: nn.Module, masked: nn.Module, inputs: _Given, placed: Sequence[Placed[Site]]
) -> float:
    """The largest difference; raises where it is more than rounding."""
    expected, got = (outputs_of(program, *inputs) for program in (masked, slim))
    if len(expected) != len(got):
        raise VerificationError(f"slim returns {len(got)} tensors, masked {len(expected)}")
    worst = 0.0
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        difference, allowed = largest_difference(a, b)
        if not difference <= allowed:
            where = _first_difference(slim, masked, inputs, placed)
            raise VerificationError(
                f"output {i} of the slim program differs from the masked one by {difference:.3g} "
                f"(rounding allows {allowed:.3g}); {where}"
            )
        worst = max(worst, difference)
    return worst


def _quiet(program: nn.Module) -> nn.Module:
    """The model with dropout switched off (its tensors are shared); itself if there is none."""
    return each_part(program, lambda _, part: _without_dropout(part))


def _without_dropout(program: fx.GraphModule) -> fx.GraphModule:
    if not any("p" in _dropout_arguments(n) for n in program.graph.nodes):
        return program
    quiet = copy.copy(program)
    graph = copy.deepcopy(program.graph)
    for node in graph.nodes:
        for name, position in _dropout_arguments(node).items():
            if len(node.args) > position:
                node.update_arg(position, 0.0)
            elif name in node.kwargs:
                node.update_kwarg(name, 0.0)
    return fx.GraphModule(quiet, graph)


def _dropout_arguments(node: fx.Node) -> dict[str, int]:
    """Where an operator takes a dropout probability: argument names and positions."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return {}
    names = [argument.name for argument in node.target._schema.arguments]
    return {n: i for i, n in enumerate(names) if n in ("p", "dropout_p")}


def _first_difference(
    slim: nn.Module, masked: nn.Module, inputs: _Given, placed: Iterable[Placed[Site]]
) -> str:
    """Which site's output projection is the first to differ."""
    watched = {node.name: one.site.name for one in placed for node, _ in one.ends}
    if not (isinstance(slim, fx.GraphModule) and isinstance(masked, fx.GraphModule)):
        return "compare part by part (without inputs) to learn where"
    values = [_record(program, inputs, set(watched)) for program in (masked, slim)]
    for node, site in watched.items():
        if node in values[0] and node in values[1]:
            difference, allowed = largest_difference(values[0][node], values[1][node])
            if not difference <= allowed:
                return f"the first site that differs is {site!r} ({difference:.3g} at {node})"
    return "no single site differs; the difference arises between or after them"


class _Recorder(fx.Interpreter):
    def __init__(self, program: fx.GraphModule, names: set[str]) -> None:
        super().__init__(program)
        self.names = names
        self.seen: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names:
            self.seen[n.name] = result
        return result


def _record(program: fx.GraphModule, inputs: _Given, names: set[str]) -> dict[str, torch.Tensor]:
    """The values of the named nodes."""
    recorder = _Recorder(program, names)
    args, kwargs = inputs
    flat = flat_inputs(program, args, kwargs)
    with torch.no_grad(), seeded(), buffers_kept(program):
        recorder.run(*flat, enable_io_processing=False)
    return recorder.seen
