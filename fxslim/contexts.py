"""Contexts of a masked program: what each head hands to the output projection, and its gradient."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx, nn

from fxslim.matrices import Product, as_matrix
from fxslim.padding import Told
from fxslim.parts import each_part
from fxslim.program import copy_program

__all__ = ["Context", "Probe", "probed"]


@dataclass(frozen=True)
class Context:
    """Where an output projection takes the heads of a site from.

    Attributes:
        site: the site's name.
        part: the path of the part of the model that it is in.
        node: the name of the masked value in the masked program.
        product: what the output projection does with it.
        samples: its dimension that tells the batch's samples apart, if there is one.
        heads: LongTensor (features,): the head of each feature, ``num_heads`` for none.
    """

    site: str
    part: str
    node: str
    product: Product
    samples: int | None
    heads: torch.Tensor = field(repr=False, compare=False)

    def rows(self, value: torch.Tensor) -> torch.Tensor:
        """(samples, rows of each, features); one sample where they cannot be told apart."""
        if self.samples is None:
            return as_matrix(value, self.product.features)[None]
        moved = value.movedim(self.samples, 0)
        after = tuple(d + (d < self.samples) for d in self.product.features)
        return as_matrix(moved, after).reshape(len(moved), -1, len(self.heads))


class Probe(nn.Module):
    """Lets a value through, and remembers it for its gradient.

    Attributes:
        context: what the value is.
        value: the one that came last.
    """

    value: torch.Tensor

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """The value itself, or a copy that takes a gradient where it takes none."""
        self.value = value if value.requires_grad else value.detach().requires_grad_()
        return self.value

    def attended_rows(self, told: Told) -> torch.Tensor:
        """The last value as (rows, features), without those rows that are told to be padding."""
        value = self.value.detach()
        rows = self.context.rows(value).flatten(0, 1)
        seen = told.operand(self.context.product, value)
        return rows if seen is None else rows[self.context.rows(seen).flatten(0, 1)[:, 0]]


def probed(masked: nn.Module) -> tuple[nn.Module, list[Probe]]:
    """A copy of a masked program with a probe at every context, sharing all of its tensors."""
    probes: list[Probe] = []

    def one(_: str, part: fx.GraphModule) -> fx.GraphModule:
        made = copy_program(part)[0]
        graph = made.graph
        nodes = {node.name: node for node in graph.nodes}
        for number, context in enumerate(part.meta["contexts"]):
            probe = Probe(context)
            probes.append(probe)
            made.add_submodule(f"probes.{number}", probe)
            node = nodes[context.node]
            with graph.inserting_after(node):
                call = graph.call_module(f"probes.{number}", (node,))
            node.replace_all_uses_with(call, delete_user_cb=lambda user, own=call: user is not own)
        made.recompile()
        return made

    return each_part(masked, one), probes
