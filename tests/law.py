"""The law that every operator rule obeys, checked on the real operators.

Narrow any free axis of a program to any set of coordinates: the result is what the program gives
when the other coordinates are masked with 0 at an operand of every sum that ends the axis, without
the positions that the axis map says are gone.  For an axis that nothing sums over, that is
f(x[A]) = f(x)[A].  Where something does, it is also additive: f(x·A) + f(x·B) - f(x·0) = f(x) for
complements A and B.
"""

import random
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxslim import graph
from fxslim.analysis import analyse
from fxslim.axes import Axis, leaves, resolve, size
from fxslim.passes.narrow import Narrow
from fxslim.positions import kept_positions, narrowed_size
from fxslim.program import copy_program
from fxslim.rules import row_for

__all__ = ["Sample", "call", "check_law", "free_axes", "program_of", "sample", "says"]

UNDETERMINED = {"empty", "empty_like", "exponential", "new_empty", "rand_like", "randn_like"}
"""Operators of which only the shapes can be compared."""


@dataclass(frozen=True)
class Sample:
    """A call of a real operator; an argument may be the call of another one.

    `says` is what the table makes of it, in the grammar of `fxslim.notation`, with ``+`` at an axis
    that is summed over, ``(a b)`` for a product and ``(a|b)`` for axes side by side.
    """

    says: str
    target: torch._ops.OperatorBase
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        return str(self.target).removeprefix("aten.")


def sample(says, target, *args, **kwargs):
    """A call whose dims are said to be `says`."""
    return Sample(says, target, args, kwargs)


def call(target, *args, **kwargs):
    """A call that makes an operand of a sample."""
    return Sample("", target, args, kwargs)


# --------------------------------------------------------------------------------------- programs


class _Builder:
    """Writes a sample's calls into a graph; its tensors become buffers."""

    def __init__(self):
        self.root, self.graph = nn.Module(), fx.Graph()
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.known = {}

    def operand(self, value):
        if isinstance(value, (list, tuple)):
            return [self.operand(item) for item in value]
        make = {Sample: self.add, torch.Tensor: self.buffer, fx.GraphModule: self.function}
        known = next((kind for kind in make if isinstance(value, kind)), None)
        if known is None:
            return value
        if id(value) not in self.known:
            self.known[id(value)] = make[known](value)
        return self.known[id(value)]

    def function(self, value):
        name = f"function{len(self.known)}"
        self.root.add_module(name, value)
        return self.graph.create_node("get_attr", name)

    def buffer(self, value):
        name = f"x{len(self.known)}"
        self.root.register_buffer(name, value)
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        return node

    def add(self, sample):
        args = tuple(self.operand(arg) for arg in sample.args)
        kwargs = {name: self.operand(arg) for name, arg in sample.kwargs.items()}
        node = self.graph.call_function(sample.target, args, kwargs)
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta.get("val"))
        with self.mode, torch.no_grad():
            node.meta["val"] = sample.target(*fake_args, **fake_kwargs)
        return node


def program_of(sample):
    """A program whose buffers are the sample's tensors and whose outputs are its results.

    Returns it with its axis map, in which that they are outputs blocks nothing, and the call.
    """
    builder = _Builder()
    last = builder.add(sample)
    alone = fx.GraphModule(builder.root, builder.graph)
    program, places = copy_program(alone)
    axis_map, last = analyse(alone).on(program, places), places[last]
    results = [last]
    if isinstance(last.meta["val"], (tuple, list)):
        results = [
            program.graph.call_function(getitem, (last, i)) for i in range(len(last.meta["val"]))
        ]
        for node, dims in zip(results, axis_map.dims[last], strict=True):
            node.meta["val"] = last.meta["val"][node.args[1]]
            axis_map.dims[node] = [dims]
    program.graph.output(tuple(results))
    return program, axis_map, last


def run(program, masks=()):
    """The results of a program, with the same random numbers every time.

    `masks` are (user, operand, dimension, positions) to be 0 where the user uses the operand.
    """
    torch.manual_seed(0)
    values: dict[fx.Node, Any] = {}

    def seen_by(user):
        def value(node):
            seen = values[node]
            for where, operand, dimension, positions in masks:
                if (where, operand) == (user, node):
                    seen = seen.index_fill(dimension, torch.tensor(positions).long(), 0)
            return seen

        return value

    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "get_attr":
                value = getattr(program, node.target)
                values[node] = value.clone() if graph.is_tensor(node) else value
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), seen_by(node))
            if node.op == "output":
                return args[0]
            values[node] = node.target(*args, **kwargs)
    raise AssertionError("a program without an output")


# -------------------------------------------------------------------------------------------- law


def free_axes(axis_map):
    """Every free axis of the program, in the order of appearance."""
    found = (leaf for dims in axis_map.dims.values() for d in dims for x in d for leaf in leaves(x))
    return [leaf for leaf in dict.fromkeys(found) if not leaf.block]


def sums(axis_map, leaf):
    """Per call that sums over `leaf`: the operands that carry it, as contractions."""
    found = {}
    for node, contractions in axis_map.contractions.items():
        ends = [c for c in contractions if leaf in set(leaves(c.dim))]
        if ends:
            found[node] = ends
    return found


def masks_of(axis_map, keep, choice=0):
    """Masks of what `keep` leaves out, at one operand (`choice` says which) of every sum."""
    masks = []
    for leaf, kept in keep.items():
        for node, contractions in sums(axis_map, leaf).items():
            c = contractions[choice % len(contractions)]
            dim = axis_map.seen_by(node, c.operand)[c.dimension]
            gone = set(range(size(dim))).difference(kept_positions(dim, {leaf: kept}))
            masks.append((node, c.operand, c.dimension, sorted(gone)))
    return masks


def what_stays(value, dims, keep):
    """`value` without the positions that are gone."""
    for position, dim in enumerate(dims):
        if narrowed_size(dim, keep) != size(dim):
            value = value.index_select(position, torch.tensor(kept_positions(dim, keep)).long())
    return value


def check_narrowing(program, axis_map, keep):
    """Narrow equals masked and selected; raises AssertionError, or what the operator raises."""
    slim = run(Narrow(axis_map, keep)(program).graph_module)
    exact = not any(graph.operator_name(node) in UNDETERMINED for node in program.graph.nodes)
    operands = [len(ends) for leaf in keep for ends in sums(axis_map, leaf).values()]
    for choice in range(max(operands, default=1)):
        dense = run(program, masks_of(axis_map, keep, choice))
        for node, got, full in zip(program.graph.output_node().args[0], slim, dense, strict=True):
            want = what_stays(full, axis_map.of(node), keep)
            assert got.shape == want.shape
            if exact:
                torch.testing.assert_close(got, want, equal_nan=True)


def check_additive(program, axis_map, leaf, kept):
    """f(x·A) + f(x·B) - f(x·0) = f(x)."""
    others = [i for i in range(leaf.size) if i not in kept]
    parts = [run(program, masks_of(axis_map, {leaf: keep})) for keep in (kept, others, [])]
    for a, b, nothing, whole in zip(*parts, run(program), strict=True):
        torch.testing.assert_close(a + b - nothing, whole)


def check_law(program, axis_map, seed=0):
    """Check the law for every free axis alone, and for all of them together."""
    rng, free = random.Random(seed), [leaf for leaf in free_axes(axis_map) if leaf.size > 1]

    def some(leaf):
        return sorted(rng.sample(range(leaf.size), rng.randint(1, leaf.size - 1)))

    whole_attention = any(row_for(node).attention for node in axis_map.contractions)
    for leaf in free:
        kept = some(leaf)
        check_narrowing(program, axis_map, {leaf: kept})
        if sums(axis_map, leaf) and not whole_attention:  # a softmax comes after that sum
            check_additive(program, axis_map, leaf, kept)
    if len(free) != 1:
        check_narrowing(program, axis_map, {leaf: some(leaf) for leaf in free})


# ---------------------------------------------------------------------------------------- in words


def says(axis_map, node):
    """What the table makes of a call: the dims of its operands and results."""
    names: dict[Axis, str] = {}

    def atom(leaf):
        name = names.setdefault(leaf, chr(ord("a") + len(names)))
        return name + "!" * bool(leaf.block) + "+" * (node in sums(axis_map, leaf))

    def term(dim):
        factors = [
            atom(f) if f.parts is None else "(" + "|".join(term(part) for part in f.parts) + ")"
            for f in resolve(dim)
        ]
        return factors[0] if len(factors) == 1 else f"({' '.join(factors)})" if factors else "1"

    def tensor(dims):
        return " ".join(term(dim) for dim in dims)

    operands = [tensor(axis_map.seen_by(node, n)) for n in graph.tensor_inputs(node)]
    results = [tensor(dims) for dims in axis_map.dims[node]]
    return f"{', '.join(operands)} -> {', '.join(results)}".strip()
