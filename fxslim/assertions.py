"""Assertions: a program says what it was captured for, and stops where it is called otherwise.

Tracing takes one side of every branch on a size or a flag, and unrolls every loop.  What it relied
on would be ignored in silence: flags, numbers and None, dtypes, sizes that became constants, the
most that a size may be, and every relation of sizes that the model's code branched on (those on
values in the inputs `torch.export` asserts itself).  PyTorch's own code branches on sizes as well,
to lay tensors out in memory; that changes no number.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from fxslim.graph import guards_of

__all__ = ["assert_inputs", "assertions_in", "relied_on"]

_TORCH = Path(torch.__file__).parent
_CALLS = _TORCH / "nn" / "modules" / "module.py"

_ASSERT_SCALAR = torch.ops.aten._assert_scalar.default

_ALIKE = (
    (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    (torch.int8, torch.int16, torch.int32, torch.int64),
    (torch.complex32, torch.complex64, torch.complex128),
)


def assert_inputs(program: fx.GraphModule, exported: ExportedProgram) -> None:
    """Assert on entry what was relied on, so that nothing else passes silently."""
    places = [node for node in program.graph.nodes if node.op == "placeholder"]
    asserted = _Assertions(program.graph, exported.range_constraints)
    with program.graph.inserting_before(places[-1].next if places else None):
        for place in places:
            value = place.meta.get("val")
            if value is None or isinstance(value, (bool, int, float, str)):
                asserted.value(place, value)
            if isinstance(value, torch.Tensor):
                asserted.dtype(place, value.dtype)
                for dim, n in enumerate(value.shape):
                    asserted.size(place, dim, n)
        for relation in relied_on(exported):
            asserted.relation(relation)
    for wanted, node in assertions_in(program.graph):
        node.args = (node.args[0], _said("the values of the inputs are not those", wanted))


def assertions_in(graph: fx.Graph) -> list[tuple[str, fx.Node]]:
    """What `torch.export` lets a program assert of values in its inputs, and where."""
    nodes = graph.find_nodes(op="call_function", target=_ASSERT_SCALAR)
    found = ((re.search("expression (.*) on node", str(n.args[1])), n) for n in nodes)
    return [(said[1] if said else str(n.args[1]), n) for said, n in found]


def relied_on(exported: ExportedProgram) -> dict[sympy.Basic, None]:
    """The relations of input sizes that the model's code branched on, in order."""
    guards = guards_of(n.meta.get("val") for n in exported.graph.find_nodes(op="placeholder"))
    return dict.fromkeys(relation for guard, relation in guards if _matters(guard))


def _matters(guard: Any) -> bool:
    """Whether the model's code branched here, or PyTorch's on a number (of chunks, say).

    What compiled code branches on counts for the Python that called it: a module's call, often,
    which branches on nothing itself.
    """
    frame = guard.sloc.framework_loc
    path = Path(getattr(frame, "filename", ""))
    if not path.is_relative_to(_TORCH) or (path.is_relative_to(_TORCH / "nn") and path != _CALLS):
        return True
    return isinstance(guard.expr, sympy.Eq) and any(side.is_number for side in guard.expr.args)


class _Assertions:
    """Writes assertions into a graph, where it is told to insert.

    Attributes:
        limits: what each symbol is between.
        sizes: for each symbol, the node that reads it, and how users spell it.
    """

    def __init__(self, graph: fx.Graph, limits: Mapping[sympy.Symbol, ValueRanges[Any]]) -> None:
        self.graph, self.tracer = graph, fx.proxy.GraphAppendingTracer(graph)
        self.limits = {s: ValueRanges(1, _most(r)) for s, r in limits.items()}
        self.sizes: dict[sympy.Symbol, tuple[fx.Node, str]] = {}

    def value(self, place: fx.Node, wanted: Any) -> None:
        """An argument that is no tensor is what it was."""
        compare: Callable[[Any, Any], Any] = operator.is_ if wanted is None else operator.eq
        fits = self.graph.call_function(compare, (place, wanted))
        self._write(fits, f"input {place.name!r} has another value than", repr(wanted))

    def dtype(self, place: fx.Node, wanted: torch.dtype) -> None:
        """A tensor's type is what it was, or as precise as another floating (or signed) type.

        A mask is added where it is floating and selects where it is boolean; bytes are pixels.
        """
        given = self.graph.call_function(getattr, (place, "dtype"))
        alike = next((kind for kind in _ALIKE if wanted in kind), (wanted,))
        fits = self.graph.call_function(operator.contains, (alike, given))
        self._write(fits, f"input {place.name!r} has another dtype than", str(wanted))

    def size(self, place: fx.Node, dim: int, n: int | torch.SymInt) -> None:
        """A size is what it was, or a symbol within its limits."""
        expression = n.node.expr if isinstance(n, torch.SymInt) else sympy.Integer(n)
        given = self.graph.call_function(torch.ops.aten.sym_size.int, (place, dim))
        given.meta["val"] = n
        other = f"input {place.name!r} has another size in dimension {dim} than"
        if expression.is_Symbol and expression not in self.sizes:
            self.sizes[expression] = given, f"{place.name}.shape[{dim}]"
            most = self.limits.get(expression, ValueRanges(1, int_oo)).upper
            if most < int_oo:
                fits = self.graph.call_function(operator.le, (given, int(most)))
                self._write(fits, other, f"at most {most}")
        elif expression.free_symbols <= self.sizes.keys():
            fits = self.graph.call_function(operator.eq, (given, self._computed(expression)))
            self._write(fits, other, self._spelt(expression))

    def relation(self, relation: sympy.Basic) -> None:
        """A relation of sizes holds, if their limits do not say so already."""
        if not relation.free_symbols or not relation.free_symbols <= self.sizes.keys():
            return
        if bound_sympy(relation, self.limits).lower:  # it cannot be false
            return
        fits = self._computed(relation)
        self._write(fits, "the sizes of the inputs are not those", self._spelt(relation))

    def _computed(self, expression: sympy.Basic) -> Any:
        """The nodes that compute an expression of sizes; a number if it is one."""
        sizes = {s: fx.Proxy(self.sizes[s][0], self.tracer) for s in expression.free_symbols}
        computed = sympy_interp(_OnProxies, sizes, expression)
        return computed.node if isinstance(computed, fx.Proxy) else computed

    def _spelt(self, expression: sympy.Basic) -> str:
        """An expression of sizes in Python."""
        names = {s: sympy.Symbol(self.sizes[s][1]) for s in expression.free_symbols}
        return str(PythonPrinter().doprint(expression.xreplace(names)))

    def _write(self, fits: fx.Node, what: str, wanted: str) -> None:
        self.graph.call_function(torch._assert, (fits, _said(what, wanted)))


def _said(what: str, wanted: str) -> str:
    return f"{what} the program was captured for ({wanted}); capture it with such an example"


class _OnProxies(PythonReferenceAnalysis):
    """Python's arithmetic, of proxies: those neither divide by sympy nor round by `math`."""

    @staticmethod
    def int_truediv(a: Any, b: Any) -> Any:
        return a / b

    @staticmethod
    def floor_to_int(x: fx.Proxy, dtype: torch.dtype) -> fx.Proxy:
        return _rounded(math.floor, x)

    @staticmethod
    def ceil_to_int(x: fx.Proxy, dtype: torch.dtype) -> fx.Proxy:
        return _rounded(math.ceil, x)

    @staticmethod
    def trunc_to_int(x: fx.Proxy, dtype: torch.dtype) -> fx.Proxy:
        return _rounded(math.trunc, x)

    @staticmethod
    def round_to_int(x: fx.Proxy, dtype: torch.dtype) -> fx.Proxy:
        return _rounded(round, x)

    @staticmethod
    def round_decimal(x: fx.Proxy, digits: int) -> fx.Proxy:
        return _rounded(round, x, digits)


def _rounded(function: Callable[..., float], x: fx.Proxy, *digits: int) -> fx.Proxy:
    return x.tracer.create_proxy("call_function", function, (x, *digits), {})


def _most(limits: ValueRanges[Any]) -> Any:
    """The upper limit, if the model has one."""
    return limits.upper if limits.upper < 2**31 else int_oo
