"""Tidying up: an exported program without the scaffolding that export leaves in its graph."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fxslim.assertions import assert_inputs
from fxslim.graph import arguments, attribute, shape
from fxslim.program import Program, copy_graph

__all__ = ["tidied", "tidy"]

aten = torch.ops.aten


def tidied(exported: ExportedProgram, model: nn.Module) -> fx.GraphModule:
    """A plain `GraphModule` under the model's own names, its graph free of export's scaffolding."""
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    _name_canonically(module, model)
    program = Program(module, copy_graph(module.graph)[0], type(model).__name__)
    tidy(program)
    assert_inputs(program, exported)
    program.graph.eliminate_dead_code()
    program.delete_all_unused_submodules()
    for name, inner in list(program.named_children()):
        if isinstance(inner, fx.GraphModule):  # what a higher-order operator calls
            setattr(program, name, Program(inner, copy_graph(inner.graph)[0]))
    program.graph.lint()
    program.recompile()
    program.train(model.training)
    return program


def tidy(program: fx.GraphModule) -> None:
    """Inline wrapped regions, drop what only observes, free views of the traced sizes.

    A softmax that is spelt out is written as one.
    """
    _inline_wrappers(program)
    _drop_assertions(program)
    _free_views(program)
    _replace_copies(program)
    _write_softmax(program)


def _name_canonically(module: fx.GraphModule, model: nn.Module) -> None:
    """Read a tied parameter under the name that comes first in the model."""
    first = {id(tensor): name for name, tensor in model.named_parameters()}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            node.target = first.get(id(attribute(module, node.target)), node.target)


def _inline_wrappers(program: fx.GraphModule) -> None:
    """Put the bodies of grad-mode and autocast regions in place of the calls that wrap them."""
    for node in list(program.graph.nodes):
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        body = next((a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"), None)
        inner = getattr(program, str(body.target), None) if body is not None else None
        if not node.target._name.startswith("wrap_with_") or not isinstance(inner, fx.GraphModule):
            continue
        operands = node.args[node.args.index(body) + 1 :]
        places = [n for n in inner.graph.nodes if n.op == "placeholder"]
        values: dict[fx.Node, Any] = dict(zip(places, operands, strict=True))
        with program.graph.inserting_before(node):
            result = program.graph.graph_copy(inner.graph, values)
        _replace_results(program, node, result)
        program.graph.erase_node(node)


def _replace_results(program: fx.GraphModule, node: fx.Node, result: Any) -> None:
    for user in list(node.users):
        if user.op == "call_function" and getattr(user.target, "__name__", "") == "getitem":
            user.replace_all_uses_with(result[user.args[1]])
            program.graph.erase_node(user)
        else:
            user.replace_input_with(node, result)


def _drop_assertions(program: fx.GraphModule) -> None:
    """Remove what only observes: tensor metadata that tracing asserted."""
    for node in list(program.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)


def _free_views(program: fx.GraphModule) -> None:
    """A view's strides are those of the traced sizes; a reshape is right at every size."""
    views = {aten.view.default, aten._unsafe_view.default}
    for node in program.graph.nodes:
        if node.target in views:
            node.target = aten.reshape.default


def _replace_copies(program: fx.GraphModule) -> None:
    """A tensor written over all of another stays itself; `copy` would have no gradient."""
    for node in list(program.graph.nodes):
        if node.target is not aten.copy.default:
            continue
        under, source = node.args[0].meta["val"], node.args[1].meta["val"]
        if shape(under) != shape(source) or under.device != source.device:
            continue
        if under.dtype == source.dtype:
            node.replace_all_uses_with(node.args[1])
            program.graph.erase_node(node)
        else:
            node.target = aten._to_copy.default
            node.args, node.kwargs = (node.args[1],), {"dtype": under.dtype}


def _write_softmax(program: fx.GraphModule) -> None:
    """Write softmax where it is spelt out: exp(x) over its sum, or exp(x - logsumexp(x))."""
    for node in list(program.graph.nodes):
        found = _over_its_sum(node) or _less_its_logarithm(node)
        if found is None or found[0].meta["val"].dtype != node.meta["val"].dtype:
            continue  # exp takes integers, which softmax does not
        with program.graph.inserting_before(node):
            softmax = program.graph.create_node(
                "call_function", aten.softmax.int, found, name="softmax"
            )
        softmax.meta = dict(node.meta)
        node.replace_all_uses_with(softmax)
        program.graph.erase_node(node)


def _over_its_sum(node: fx.Node) -> tuple[Any, int] | None:
    """The scores x and the dimension, if `node` is exp(x) divided by its sum over it."""
    if node.target is not aten.div.Tensor:
        return None
    above, below = node.args
    if not _calls(above, aten.exp.default) or not _calls(below, aten.sum.dim_IntList):
        return None
    dim = _reduced(below)
    return (above.args[0], dim) if below.args[0] is above and dim is not None else None


def _less_its_logarithm(node: fx.Node) -> tuple[Any, int] | None:
    """The scores x and the dimension, if `node` is exp(x - logsumexp(x)) over it."""
    if node.target is not aten.exp.default or not _calls(node.args[0], aten.sub.Tensor):
        return None
    x, total = node.args[0].args
    if node.args[0].kwargs or not _calls(total, aten.logsumexp.default):
        return None
    dim = _reduced(total)
    return (x, dim) if total.args[0] is x and dim is not None else None


def _calls(node: Any, operator: Any) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.target is operator


def _reduced(node: fx.Node) -> int | None:
    """The one dimension that a reduction keeps with size 1, if it does no more than that."""
    given = arguments(node)
    dims = given["dim"]
    return dims[0] if given["keepdim"] and len(dims) == 1 and not given.get("dtype") else None
