"""The law that every operator rule obeys, checked on the real operators.

Narrow any free axis of a program to any set of coordinates: the result is what the program gives
when the other coordinates are masked with 0 at an operand of every contraction that ends the axis,
without the positions that the axis map says are gone.  For an axis that nothing sums over that is
f(x[A]) = f(x)[A]; and where it is summed over, the sum is also additive:
f(x·A) + f(x·B) - f(x·0) = f(x) for complements A and B.
"""

import copy
import random
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxslim import graph
from fxslim.analysis import AxisMap, analyse
from fxslim.axes import Axis, kept_positions, leaves, narrowed_size, resolve, size
from fxslim.passes.base import copy_program
from fxslim.passes.narrow import Narrow
from fxslim.rules import row_for

UNDETERMINED = {"empty", "empty_like", "new_empty", "rand_like", "randn_like"}
"""Operators of which only the shapes can be compared."""


@dataclass(frozen=True)
class Sample:
    """A call of a real operator; an argument may be the call of another one.

    `says` is what the table makes of it, in the grammar of `fxslim.notation`, with ``+`` at an axis
    that is summed over, ``(a b)`` for a product and ``(a|b)`` for axes side by side.
    """

    says: str
    target: torch._ops.OpOverload
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


def program_of(sample):
    """A program whose parameters are the sample's tensors and whose outputs are its results.

    Returns it with its axis map, in which neither parameters nor outputs block anything.
    """
    root, mode = nn.Module(), FakeTensorMode(shape_env=ShapeEnv())
    made = fx.Graph(root)
    known: dict[int, fx.Node] = {}

    def place(value):
        if isinstance(value, Sample):
            return known.setdefault(id(value), add(value))
        if isinstance(value, (list, tuple)):
            return [place(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in known:
            root.register_buffer(f"x{len(known)}", value)
            known[id(value)] = node = made.get_attr(f"x{len(known)}")
            node.meta["val"] = mode.from_tensor(value, static_shapes=True)
        return known[id(value)]

    def add(sample):
        args = tuple(place(arg) for arg in sample.args)
        kwargs = {name: place(arg) for name, arg in sample.kwargs.items()}
        node = made.call_function(sample.target, args, kwargs)
        fakes = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with mode, torch.no_grad():
            node.meta["val"] = sample.target(*fakes[0], **fakes[1])
        return node

    last = add(sample)
    axis_map = analyse(fx.GraphModule(root, made))
    program, places = copy_program(axis_map.program)
    axis_map = axis_map.on(program, places)
    results = [places[last]]
    if isinstance(last.meta["val"], (tuple, list)):
        results = [
            program.graph.call_function(getitem, (places[last], i))
            for i, value in enumerate(last.meta["val"])
            if isinstance(value, torch.Tensor)
        ]
        for node, dims in zip(results, axis_map.dims[places[last]], strict=True):
            node.meta["val"] = places[last].meta["val"][node.args[1]]
            axis_map.dims[node] = [dims]
    program.graph.output(tuple(results))
    program.recompile()
    return program, axis_map, places[last]


def run(program):
    """The results of a program without inputs, with the same random numbers every time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return copy.deepcopy(program)()


def results_of(program):
    """The nodes that the program returns."""
    return program.graph.output_node().args[0]


def all_leaves(axis_map):
    """Every leaf of the program, in the order of appearance."""
    found = (leaf for dims in axis_map.dims.values() for d in dims for x in d for leaf in leaves(x))
    return list(dict.fromkeys(found))


# -------------------------------------------------------------------------------------------- law


def summed(axis_map, leaf):
    """Per contraction that ends `leaf`: the node and its operands that carry it."""
    found: dict[fx.Node, list[Any]] = {}
    for node, contractions in axis_map.contractions.items():
        for contraction in contractions:
            if leaf in set(leaves(contraction.dim)):
                found.setdefault(node, []).append(contraction)
    return found


def masked(program, axis_map, keep, choice=0):
    """`program` with 0 at the coordinates that `keep` leaves out, where each axis ends.

    A product needs the mask at one of its operands: `choice` says at which.
    """
    made, places = copy_program(program)
    seen: dict[Any, fx.Node] = {}
    for leaf, kept in keep.items():
        for node, contractions in summed(axis_map, leaf).items():
            c = contractions[choice % len(contractions)]
            dim = axis_map.seen_by(node, c.operand)[c.dimension]
            stay = set(kept_positions(dim, {leaf: kept}))
            gone = [p for p in range(size(dim)) if p not in stay]
            operand = seen.get((node, c.operand), places[c.operand])
            seen[node, c.operand] = _filled(made, places[node], operand, c.dimension, gone)
    made.recompile()
    return made


def _filled(program, user, operand, dimension, positions):
    """Insert a call that fills `positions` of an operand with 0, where `user` uses it."""
    name = f"gone_{len(list(program.buffers()))}"
    program.register_buffer(name, torch.tensor(positions, dtype=torch.long))
    with program.graph.inserting_before(user):
        index = program.graph.get_attr(name)
        fill = torch.ops.aten.index_fill.int_Scalar
        filled = program.graph.call_function(fill, (operand, dimension, index, 0))
    user.replace_input_with(operand, filled)
    return filled


def selected(value, dims, keep):
    """What stays of a result."""
    for position, dim in enumerate(dims):
        if narrowed_size(dim, keep) != size(dim):
            value = value.index_select(position, torch.tensor(kept_positions(dim, keep)).long())
    return value


def check_narrowing(program, axis_map, keep):
    """f(x[A]) is f(x masked), selected; raises AssertionError (or what the operator raises)."""
    slim = run(Narrow(axis_map, keep)(program).graph_module)
    undetermined = any(graph.operator_name(node) in UNDETERMINED for node in program.graph.nodes)
    for choice in range(2):
        dense = run(masked(program, axis_map, keep, choice))
        for node, got, full in zip(results_of(program), slim, dense, strict=True):
            want = selected(full, axis_map.of(node), keep)
            if undetermined:
                got, want = got.new_zeros(got.shape), want.new_zeros(want.shape)
            torch.testing.assert_close(got, want, equal_nan=True)


def check_additive(program, axis_map, leaf, kept):
    """f(x·A) + f(x·B) - f(x·0) = f(x)."""
    others = [i for i in range(leaf.size) if i not in kept]
    parts = [run(masked(program, axis_map, {leaf: keep})) for keep in (kept, others, [])]
    for a, b, nothing, whole in zip(*parts, run(program), strict=True):
        torch.testing.assert_close(a + b - nothing, whole)


def keep_sets(leaf, rng, count=2):
    """Random coordinates of `leaf` and their complement; never all, never none."""
    for _ in range(count):
        kept = sorted(rng.sample(range(leaf.size), rng.randint(1, leaf.size - 1)))
        yield kept
        yield [i for i in range(leaf.size) if i not in kept]


def check_law(program, axis_map, seed=0):
    """Check the law for every free axis alone, and for all of them together."""
    rng = random.Random(seed)
    free = [leaf for leaf in all_leaves(axis_map) if not leaf.block and leaf.size > 1]
    additive = all(row_for(n) is None or not row_for(n).attention for n in axis_map.contractions)
    for leaf in free:
        for kept in keep_sets(leaf, rng):
            check_narrowing(program, axis_map, {leaf: kept})
        if additive and summed(axis_map, leaf):
            check_additive(program, axis_map, leaf, kept)
    for _ in range(2):
        check_narrowing(program, axis_map, {leaf: next(keep_sets(leaf, rng)) for leaf in free})


# ---------------------------------------------------------------------------------------- in words


def says(axis_map, node):
    """What the table makes of a call: the dims of its operands and results."""
    names: dict[Axis, str] = {}

    def axis(leaf):
        name = names.setdefault(leaf, chr(ord("a") + len(names)))
        ends = node in summed(axis_map, leaf)
        return name + "!" * bool(leaf.block) + "+" * ends

    def term(dim):
        if dim == ():
            return "1"
        factors = [
            axis(f) if f.parts is None else "(" + "|".join(term(p) for p in f.parts) + ")"
            for f in dim
        ]
        return factors[0] if len(factors) == 1 else "(" + " ".join(factors) + ")"

    def tensor(dims):
        return " ".join(term(resolve(dim)) for dim in dims)

    operands = [n for n in graph.tensor_inputs(node) if graph.is_tensor(n)]
    left = ", ".join(tensor(axis_map.seen_by(node, n)) for n in operands)
    return f"{left} -> {', '.join(tensor(dims) for dims in axis_map.dims[node])}".strip()


__all__ = [
    "AxisMap",
    "Sample",
    "all_leaves",
    "call",
    "check_law",
    "program_of",
    "replace",
    "sample",
    "says",
]
