"""The one place that knows `torch.fx`: arguments by name, sizes, module paths, constants."""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from fxslim.axes import SYMBOLIC

__all__ = [
    "add_constant",
    "arguments",
    "attribute",
    "constant",
    "example_size",
    "fake_mode_of",
    "fixed_size",
    "generic_size",
    "guards_of",
    "holds",
    "is_symbolic",
    "is_tensor",
    "module_path",
    "moves",
    "operator_name",
    "set_argument",
    "set_attribute",
    "shape",
    "subgraph",
    "tensor_inputs",
    "user_name",
]

_HIGHLY_COMPOSITE = 2**6 * 3**2 * 5 * 7


@functools.lru_cache(maxsize=4096)
def _symbol_value(name: str) -> int:
    """The generic value of a symbol: of its own, prime, and large even after many strides.

    Nothing divides a length by chance: where a model needs it to be divisible, it says so with a
    size of its own (``length // 4``), and the two differ here.
    """
    high, low = (zlib.crc32(text.encode()) for text in (name, name[::-1]))
    return int(sympy.nextprime(SYMBOLIC**2 + (high << 32) + low))


@functools.lru_cache(maxsize=65536)
def _evaluate(expression: sympy.Expr) -> int:
    value = _at_the_point(expression)
    if is_symbolic(value) or not expression.free_symbols:
        return value
    # A quotient that is the same everywhere is a number; a remainder's value tells nothing.
    constant = all(_at_the_point(expression, point=n) == value for n in range(1, 12))
    return value if constant else _symbol_value(str(expression))


def _at_the_point(expression: sympy.Expr, scale: int = 1, point: int = 0) -> int:
    """The value of `expression` where every symbol has its generic value, times `scale`.

    There are other points to look at, in each of which every symbol has another value.
    """
    names = {symbol: f"{symbol}{'*' * point}" for symbol in expression.free_symbols}
    values = {s: sympy.Integer(scale * _symbol_value(name)) for s, name in names.items()}
    return int(expression.xreplace(values))


def generic_size(value: int | torch.SymInt) -> int:
    """`value` as a plain integer; a symbolic one is evaluated at the generic point.

    Two symbolic sizes that are equal there are equal everywhere, as polynomials that agree at a
    random point do (Schwartz 1980, Zippel 1979), so sizes can be multiplied, divided and compared
    exactly without a symbolic algebra.
    """
    if isinstance(value, torch.SymInt):
        return _evaluate(value.node.expr)
    return int(value)


def fixed_size(value: int | torch.SymInt) -> int | None:
    """`value` if it is the same for all inputs (export may leave a symbol there), else None."""
    expression = value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)
    return int(expression) if expression.is_number else None


def holds(relation: Any) -> bool:
    """Whether a relation of sizes holds in general; only equations can fail to.

    That a length is divisible by some number relates it to no other length, so it counts as true.
    """
    if not isinstance(relation, sympy.Eq):
        return True
    left, right = (_at_the_point(side, _HIGHLY_COMPOSITE) for side in (relation.lhs, relation.rhs))
    return left == right


def fake_mode_of(values: Iterable[Any]) -> FakeTensorMode | None:
    """The mode that fake tensors were made in, whichever one is active around us."""
    leaves = (leaf for value in values for leaf in pytree.tree_leaves(value))
    return next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)


def guards_of(values: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """What tracing relied on about the sizes of fake tensors: guards, each with its relation."""
    mode = fake_mode_of(values)
    environment = mode.shape_env if mode is not None else None
    if environment is not None:
        yield from ((guard, environment.replace(guard.expr)) for guard in environment.guards)


def example_size(value: int | torch.SymInt) -> int:
    """`value` at the sizes of the example that the program was captured with.

    A size that depends on data has none there; it is given one.
    """
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        hint = value.node.hint if value.node.has_hint() else None
        if hint is None:
            hint = expression.xreplace({s: sympy.Integer(12) for s in expression.free_symbols})
        return int(hint)
    return int(value)


def is_tensor(node: fx.Node) -> bool:
    """Whether `node` computes one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def shape(value: object) -> tuple[int, ...]:
    """The generic sizes of a (fake) tensor."""
    assert isinstance(value, torch.Tensor)
    return tuple(generic_size(n) for n in value.shape)


def operator_name(node: fx.Node) -> str:
    """The operator's name as the rule table spells it: ``linear``, ``namespace::op`` off ATen."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name
        return name.removeprefix("aten::")
    return getattr(target, "__name__", str(target)) if node.op == "call_function" else node.op


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by the names of its schema, defaults filled in."""
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        bound = inspect.signature(target.__call__).bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        return bound.arguments
    assert isinstance(target, torch._ops.OpOverload)
    named: dict[str, Any] = {}
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            named[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            named[argument.name] = node.kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value if argument.has_default_value() else None
    return named


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set one argument of an operator call by its name in the schema."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    names = [a.name for a in target._schema.arguments if not a.kwarg_only]
    if name in names and names.index(name) < len(node.args):
        node.update_arg(names.index(name), value)
    else:
        node.update_kwarg(name, value)


_NO_TENSOR = (torch.SymInt, type(None))  # None: a graph, for a higher-order operator to call


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes of `node`'s inputs that carry tensors, in the order of its arguments."""
    return [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), _NO_TENSOR)]


def _stack(node: fx.Node) -> Iterator[str]:
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    for path, _ in stack.values():
        yield path


def module_path(node: fx.Node) -> str:
    """The path of the innermost module whose code `node` comes from; empty for the model itself."""
    return (list(_stack(node)) or [""])[-1]


def user_name(node: fx.Node) -> str:
    """How messages name a node: its operator, its own name, and the module it comes from."""
    path = module_path(node)
    return f"{operator_name(node)} ({node.name}{f' in {path}' if path else ''})"


def moves(node: fx.Node) -> bool:
    """Whether an operator moves, scales or shifts the elements of its one activation."""
    is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return is_view or operator_name(node) in _MOVING


_MOVING = {"_unsafe_view", "add", "clone", "div", "getitem", "mul", "neg", "reshape", "sub"}

_UNCHANGED = {"alias", "clone", "detach", "lift_fresh_copy", "to", "_to_copy", "contiguous"}


def constant(node: fx.Node | None) -> list[int] | None:
    """The integers of a constant one-dimensional tensor, if `node` is one."""
    while node is not None and node.op == "call_function" and operator_name(node) in _UNCHANGED:
        source = node.args[0]
        node = source if isinstance(source, fx.Node) else None
    if node is None or node.op != "get_attr" or node.graph.owning_module is None:
        return None
    value = attribute(node.graph.owning_module, str(node.target))
    if not isinstance(value, torch.Tensor) or value.is_meta or value.is_floating_point():
        return None
    return (
        [int(x) for x in value.tolist()] if value.ndim == 1 and value.dtype != torch.bool else None
    )


def attribute(module: torch.nn.Module, target: str) -> Any:
    """The attribute at a dotted path."""
    return functools.reduce(getattr, target.split("."), module)


def set_attribute(module: torch.nn.Module, target: str, value: torch.Tensor) -> None:
    """Put a parameter or buffer at a dotted path, in place of the one that is there."""
    *path, name = target.split(".")
    owner: torch.nn.Module = functools.reduce(getattr, path, module)
    if name in owner._parameters:
        assert isinstance(value, torch.nn.Parameter)
        owner._parameters[name] = value
    elif name in owner._buffers:
        owner._buffers[name] = value
    else:
        setattr(owner, name, value)


def is_symbolic(n: int) -> bool:
    """Whether a generic size stands for a symbolic length."""
    return n >= SYMBOLIC


def subgraph(node: fx.Node) -> fx.Graph:
    """The graph that is an argument of a higher-order operator."""
    assert node.graph.owning_module is not None
    module = attribute(node.graph.owning_module, str(node.target))
    assert isinstance(module, fx.GraphModule)
    return module.graph


def add_constant(before: fx.Node, value: torch.Tensor) -> fx.Node:
    """A `get_attr` node, placed before another, of a new buffer outside the state dict."""
    module = before.graph.owning_module
    assert module is not None
    name = next(n for n in map("kept_positions_{}".format, count()) if not hasattr(module, n))
    module.register_buffer(name, value, persistent=False)
    with before.graph.inserting_before(before):
        return before.graph.get_attr(name)
