"""RemoveHeadMasks: a masked program becomes the program that it was made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxslim.passes.base import GraphPass, eliminate_dead_code
from fxslim.program import copy_program

__all__ = ["RemoveHeadMasks"]


@dataclass(frozen=True)
class RemoveHeadMasks(GraphPass):
    """Undo `InsertHeadMasks`, whatever the masks are set to.

    Before: any program.  After: one that nowhere multiplies by a head mask, without the masks.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Return the program without masks; tensors are shared."""
        plain, _ = copy_program(graph_module)
        products = [node for node in plain.graph.nodes if _is_masking(node)]
        for node in products:
            node.replace_all_uses_with(node.args[0])
        eliminate_dead_code(plain)
        if hasattr(plain, "head_masks"):
            del plain.head_masks
        for key in ("contexts", "sites"):
            plain.meta.pop(key, None)
        return PassResult(plain, bool(products))


def _is_masking(node: fx.Node) -> bool:
    """Whether a node multiplies a context by the masks of its positions' heads."""
    if node.target is not torch.ops.aten.mul.Tensor:
        return False
    factor = node.args[1]
    if not isinstance(factor, fx.Node) or factor.target is not torch.ops.aten.index.Tensor:
        return False
    return any(str(n.target).startswith("head_masks.") for n in factor.all_input_nodes)
