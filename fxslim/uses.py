"""Uses of a weight: where its product joins the residual stream, and what it should be there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from fxslim.graph import is_tensor, moves, operator_name
from fxslim.matrices import Product
from fxslim.walk import Walk

__all__ = ["Use", "use_of"]


@dataclass(frozen=True)
class Use:
    """One product with a weight in the slim program, and what it is to come to.

    Attributes:
        node: the product.
        place: where it is in the graph.
        chain: what is done to it before it is added to the residual stream.
        residual: what it is added to, where that is known before it.
        dense: the same product in the dense program.
        total: the sum in the dense program; without a `residual`, the product.
    """

    product: Product
    node: fx.Node
    place: int
    chain: tuple[fx.Node, ...]
    residual: fx.Node | None
    dense: fx.Node
    total: fx.Node

    def wanted(
        self, ours: Walk, batch: int, product: torch.Tensor, total: torch.Tensor
    ) -> torch.Tensor:
        """What the slim product of a batch should be.

        That is the dense total less the slim residual, moved back through the chain; where there is
        no residual, or the chain does more than move, scale and shift: the dense product.
        """
        if self.residual is None:
            return product
        gap: torch.Tensor = total.double() - ours.value(self.residual, batch).double()
        if not self.chain:
            return gap

        def through(value: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = ours.through(self.node, self.chain, value, batch)
            return result

        like = product.double()
        line = torch.arange(1, like.numel() + 1, dtype=like.dtype, device=like.device)
        offset = through(torch.zeros_like(like))
        factor = through(torch.ones_like(like)) - offset
        places = ((through(line.view(like.shape)) - offset) / factor).round() - 1
        again = through(like)
        if gap.shape != again.shape or not _rearranges(places, like, factor, offset, again):
            return product
        result = torch.empty_like(like)
        result.view(-1)[places.flatten().long()] = ((gap - offset) / factor).flatten()
        return result


def _rearranges(
    places: torch.Tensor,
    value: torch.Tensor,
    factor: torch.Tensor,
    offset: torch.Tensor,
    result: torch.Tensor,
) -> bool:
    """Whether the chain moves each element of `value` to one place, scaled and shifted there."""
    flat = places.flatten()
    if not places.isfinite().all() or flat.numel() != value.numel():
        return False
    if not torch.equal(flat.sort().values, torch.arange(len(flat)).to(flat)):
        return False
    moved = value.flatten()[flat.long()].view(places.shape) * factor + offset
    return bool(torch.allclose(moved, result.double(), rtol=1e-4, atol=1e-6))


def use_of(walk: Walk, product: Product, node: fx.Node, dense: Mapping[str, fx.Node]) -> Use:
    """Follow the result to where it is added to something that is known by then."""
    chain: list[fx.Node] = []
    last, same = node, dense[product.node]
    while len(last.users) == 1:
        (user,) = last.users
        given = [n for n in user.all_input_nodes if n is not last and not walk.is_constant(n)]
        tensors = [n for n in given if is_tensor(n)]
        if user.name not in dense or len(tensors) > 1 or user.op != "call_function":
            break
        if tensors:
            known = walk.place[tensors[0]] < walk.place[node]
            if operator_name(user) == "add" and not user.kwargs and known:
                total = dense[user.name]
                return Use(product, node, walk.place[node], tuple(chain), tensors[0], same, total)
            break
        if not moves(user):
            break
        chain.append(user)
        last = user
    return Use(product, node, walk.place[node], (), None, same, same)
