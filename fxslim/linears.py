"""Linears: a program whose products with weights are `nn.Linear` modules again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import fx, nn

from fxslim.graph import arguments, attribute
from fxslim.parts import each_part
from fxslim.program import Program, copy_program

__all__ = ["linear_modules"]


def linear_modules(slim: nn.Module) -> nn.Module:
    """Return `slim` with an `nn.Linear` for each linear operator, for tools that swap those.

    ``torchao.quantization.quantize_(fxslim.linear_modules(slim), config)`` quantizes a slim model.
    Names in the state dict stay.  A weight that something else reads, too (a tied embedding), stays
    as it is.  This is the last step: fxslim itself takes programs of operators only.

    Args:
        slim: what `fxslim.compile` or `fxslim.capture` returned; not changed, tensors are shared.
    """
    return each_part(slim, lambda _, part: _with_modules(part))


def _with_modules(part: fx.GraphModule) -> Program:
    program, _ = copy_program(part)
    calls = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    linears = set(calls)
    readers: dict[str, set[fx.Node]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        readers.setdefault(str(node.target), set()).update(node.users)
    for call in calls:
        given = arguments(call)
        names = {own: _name(given[own]) for own in ("weight", "bias")}
        owner, _, own = names["weight"].rpartition(".")
        if own != "weight" or names["bias"] not in ("", f"{owner}.bias"):
            continue
        if not readers[names["weight"]] <= linears or not _holds_no_more(program, owner, names):
            continue
        _put(program, owner, names)
        with program.graph.inserting_before(call):
            module_call = program.graph.call_module(owner, (given["input"],))
        module_call.meta = dict(call.meta)
        call.replace_all_uses_with(module_call)
        program.graph.erase_node(call)
    program.graph.eliminate_dead_code()
    program.graph.lint()
    program.recompile()
    return program


def _name(node: fx.Node | None) -> str:
    """The name of the parameter that `node` reads; empty for none, no name for what is none."""
    if node is None:
        return ""
    return str(node.target) if node.op == "get_attr" else "."


def _holds_no_more(program: Program, owner: str, names: Mapping[str, str]) -> bool:
    """Whether the module at `owner` holds this weight and bias and nothing else."""
    module = program.get_submodule(owner)
    held = {*module._parameters, *module._buffers, *module._modules}
    return held == {own for own, name in names.items() if name}


def _put(program: Program, owner: str, names: Mapping[str, str]) -> None:
    """An `nn.Linear` at `owner`, of the parameters that are there."""
    if isinstance(program.get_submodule(owner), nn.Linear):
        return
    weight = cast(nn.Parameter, attribute(program, names["weight"]))
    features, width = weight.shape
    linear = nn.Linear(width, features, bias=bool(names["bias"]), device="meta")
    linear.weight = weight
    if names["bias"]:
        linear.bias = cast(nn.Parameter, attribute(program, names["bias"]))
    program.set_submodule(owner, linear.train(program.training))
