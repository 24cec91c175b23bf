"""Print a program with its axes: what tests, docs and bug reports quote."""

from __future__ import annotations

from torch import fx

from fxslim import graph
from fxslim.analysis import AxisMap
from fxslim.axes import Axis, Dim, leaves, resolve
from fxslim.locate import locate

__all__ = ["show"]


def show(program: fx.GraphModule) -> str:
    """The graph, a line a node, with what each dimension is made of, and its sites.

    ``[h4·d16]`` is a product of axes of 4 and 16 positions, ``[a|b]`` axes side by side, ``1`` a
    unit dimension, ``s`` a symbolic length; ``!`` marks an axis that an operator reads as a whole.
    """
    located = locate(program)
    names = _Names()
    lines = [
        f"{node.name}{_dims(located.axis_map, node, names)} = {_call(node)}"
        for node in program.graph.nodes
        if node.op != "output"
    ]
    for site in located.sites:
        state = "prunable" if site.prunable else f"refused: {site.reason}"
        lines.append(f"# {site.name}: {site.kind}, {site.num_heads} heads, {state}")
    return "\n".join(lines)


class _Names:
    """Short names for axes, in the order of their first appearance."""

    def __init__(self) -> None:
        self.known: dict[Axis, str] = {}

    def __call__(self, axis: Axis) -> str:
        length = "s" if graph.is_symbolic(axis.size) else str(axis.size)
        name = self.known.setdefault(axis, f"{_letters(len(self.known))}{length}")
        return name + ("!" if axis.block else "")


def _letters(number: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    text = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        text = chr(ord("a") + rest) + text
    return text


def _dims(axis_map: AxisMap, node: fx.Node, names: _Names) -> str:
    results = axis_map.dims.get(node, [])
    return "".join(" [" + ", ".join(_dim(d, names) for d in dims) + "]" for dims in results)


def _dim(dim: Dim, names: _Names) -> str:
    factors = resolve(dim)
    if not any(True for _ in leaves(dim)) and not factors:
        return "1"
    return "·".join(
        names(f) if f.parts is None else "(" + " | ".join(_dim(p, names) for p in f.parts) + ")"
        for f in factors
    )


def _call(node: fx.Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return f"{node.op} {node.target}"
    arguments = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
    return f"{graph.operator_name(node)}({', '.join(arguments)})"
