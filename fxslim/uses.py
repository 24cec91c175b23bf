"""Uses of a weight: where its product joins the residual stream, and what it should be there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxslim.follow import closure
from fxslim.graph import is_tensor, moves, operator_name
from fxslim.matrices import Product, as_matrix
from fxslim.walk import Walk

__all__ = ["Use", "bias_of", "matrix_of", "readers", "use_of"]


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


def matrix_of(walk: Walk, product: Product, node: fx.Node) -> tuple[str, torch.Tensor] | None:
    """The one parameter behind a product's weight, and where in it each entry of the matrix is."""
    operand = node.all_input_nodes[product.weight]
    found = _placed(walk, operand)
    if found is None:
        return None
    parameter, places = found
    if bool((places.flatten().sort().values.diff() == 0).any()):
        return None
    return str(parameter.target), as_matrix(places, product.weight_features).mT


def bias_of(walk: Walk, product: Product, node: fx.Node) -> str | None:
    """The parameter that the product adds, one number an output."""
    inputs = node.all_input_nodes
    others = [n for n in inputs if n not in (inputs[product.operand], inputs[product.weight])]
    found = _placed(walk, others[0]) if len(others) == 1 else None
    if found is None:
        return None
    parameter, places = found
    outputs = tuple(node.meta["val"].shape[d] for d in product.outputs)
    whole = torch.equal(places, torch.arange(places.numel(), device=places.device))
    return str(parameter.target) if whole and tuple(places.shape) == outputs else None


def _placed(walk: Walk, constant: fx.Node) -> tuple[fx.Node, torch.Tensor] | None:
    """The one parameter behind a value, and where in it each entry lies; None if it is computed.

    Numbers of entries are sent through the same operators.  One that gives them back in another
    type casts, and entries stay where they are.
    """
    if not walk.is_constant(constant):
        return None
    before = set(closure([constant], lambda n: n.all_input_nodes))
    read = [n for n in walk.nodes if n in before and n.op == "get_attr"]
    parameters = [n for n in read if isinstance(walk.constant(n), nn.Parameter)]
    if len(parameters) != 1:
        return None
    (parameter,) = parameters
    values = walk.constant(parameter)
    numbers = torch.arange(values.numel(), dtype=torch.float64, device=values.device)
    moved: dict[fx.Node, Any] = {parameter: numbers.view(values.shape)}
    for node in (n for n in walk.nodes if n in before and n.op == "call_function"):
        source = next((n for n in node.all_input_nodes if n in moved), None)
        if source is None:
            continue
        if any(_is_floating(walk.constant(n)) for n in node.all_input_nodes if n not in moved):
            return None  # it is computed with something else
        value = walk.constant(node, moved)
        cast = isinstance(value, torch.Tensor) and value.dtype != numbers.dtype
        moved[node] = moved[source] if cast else value
    found, actual = moved[constant], walk.constant(constant)
    if not isinstance(found, torch.Tensor) or found.shape != actual.shape:
        return None
    if not ((found == found.round()) & (found >= 0) & (found < values.numel())).all():
        return None
    places = found.long()
    same = torch.equal(values.flatten()[places].to(actual.dtype), actual)
    return (parameter, places) if same else None


def _is_floating(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


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


def readers(walk: Walk) -> dict[int, set[fx.Node]]:
    """For each tensor by its id, the nodes that it reaches through constants alone."""
    found: dict[int, set[fx.Node]] = {}
    for node in walk.nodes:
        if node.op == "get_attr":
            reached = closure([node], lambda n: n.users if walk.is_constant(n) else ())
            ends = {n for n in reached if not walk.is_constant(n)}
            found.setdefault(id(walk.constant(node)), set()).update(ends)
    return found
