"""InsertHeadMasks: one multiplier a head, where the context's heads are summed over."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from fxslim.axes import Axis, leaves, size
from fxslim.calls import Dims
from fxslim.contexts import Context
from fxslim.graph import is_symbolic, is_tensor, shape
from fxslim.masks import mask_name
from fxslim.matrices import product_of
from fxslim.parts import path_of
from fxslim.passes.base import GraphPass, check_analysed, infer_shapes, isolate
from fxslim.placed import Head, Located, Placed
from fxslim.positions import coordinates
from fxslim.program import copy_program
from fxslim.sites import Site
from fxslim.weights import Weights

__all__ = ["InsertHeadMasks"]


@dataclass(frozen=True)
class InsertHeadMasks(GraphPass):
    """Multiply each prunable site's context by ``head_masks.<site>``, one number a head.

    Before: a captured program, located.  After: a program that computes the same while every mask
    is 1; a mask of 0 removes the head's contribution to the output projection, as narrowing will.

    Attributes:
        located: `fxslim.sites.locate` of the program that the pass is applied to.
        trainable: make the masks parameters (their gradients are importance scores), else buffers.
    """

    located: Located
    trainable: bool = True

    @functools.cached_property
    def _weights(self) -> Weights:
        return Weights(self.located.axis_map)

    @functools.cached_property
    def _batch(self) -> int | None:
        """The (generic) size of the first dimension of the inputs, where it is symbolic."""
        places = self.located.axis_map.program.graph.find_nodes(op="placeholder")
        shapes = (shape(place.meta["val"]) for place in places if is_tensor(place))
        first = next((sizes[0] for sizes in shapes if sizes), None)
        return first if first is not None and is_symbolic(first) else None

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Return the masked program; each mask is (heads,), of its operand's dtype and device.

        Raises:
            ValueError: the program was masked before, or it is not the one that was located.
        """
        check_analysed(self.located.axis_map, graph_module)
        if hasattr(graph_module, "head_masks"):
            raise ValueError("the program has head masks already; set those, or mask the original")
        masked, places = copy_program(graph_module)
        masked.add_submodule("head_masks", nn.Module())
        placed = [one for one in self.located.placed if one.site.prunable]
        contexts: list[Context] = []
        masked_by: dict[tuple[fx.Node, fx.Node], fx.Node] = {}  # contexts may lie side by side
        for one in placed:
            mask = self._add_mask(masked, one)
            for number, (user, contraction) in enumerate(one.ends):
                dims = self.located.axis_map.seen_by(user, contraction.operand)
                index = f"{mask.target}/index{number}"
                use = user, contraction.operand
                read = masked_by.get(use, places[contraction.operand])
                product = masked_by[use] = _multiply(places[user], read, dims, one, mask, index)
                contexts += self._context(one, *use, product)
        infer_shapes(masked)
        masked.meta["contexts"] = contexts
        masked.meta["sites"] = [one.site for one in placed]
        return PassResult(masked, bool(placed))

    def _context(
        self, placed: Placed[Site], user: fx.Node, operand: fx.Node, product: fx.Node
    ) -> list[Context]:
        """What `user` multiplies by a weight, if it sums over all that carries heads."""
        axis_map = self.located.axis_map
        found = product_of(self._weights, user, operand)
        dims = axis_map.seen_by(user, operand)
        axes = {axis for head in placed.heads for axis in head}
        carrying = {d for d, dim in enumerate(dims) if set(leaves(dim)) & axes}
        if found is None or not carrying <= set(found.features):
            return []
        summed = tuple(dims[d] for d in found.features)
        if any(is_symbolic(size(dim)) for dim in summed):
            return []
        heads = _head_of_each_position(placed, summed).expand([size(dim) for dim in summed])
        batch = [d for d, n in enumerate(shape(operand.meta["val"])) if n == self._batch]
        samples = batch[0] if len(batch) == 1 else None
        part = path_of(axis_map.program)
        name = placed.site.name
        return [Context(name, part, product.name, found, samples, heads.flatten())]

    def _add_mask(self, masked: fx.GraphModule, placed: Placed[Site]) -> fx.Node:
        target = mask_name(placed.site.name)
        like = placed.ends[0][1].operand.meta["val"]
        ones = torch.ones(len(placed.heads), dtype=like.dtype, device=like.device)
        owner, name = masked.get_submodule("head_masks"), target.removeprefix("head_masks.")
        if self.trainable:
            owner.register_parameter(name, nn.Parameter(ones))
        else:
            owner.register_buffer(name, ones)
        with masked.graph.inserting_before(next(iter(masked.graph.nodes))):
            return masked.graph.get_attr(target)


def _multiply(
    user: fx.Node, operand: fx.Node, dims: Dims, placed: Placed[Site], mask: fx.Node, index: str
) -> fx.Node:
    """Multiply `operand`, as `user` sees it, by the mask of each position's head."""
    graph = user.graph
    masks = cast("nn.Module", graph.owning_module).get_submodule("head_masks")
    axes = {axis for head in placed.heads for axis in head}
    with graph.inserting_before(user):
        isolated = isolate(operand, dims, axes)
        heads = _head_of_each_position(placed, isolated.dims)
        device = operand.meta["val"].device
        masks.register_buffer(index.removeprefix("head_masks."), heads.to(device), persistent=False)
        place = graph.get_attr(index)
        if int(heads.max()) == len(placed.heads):  # some positions belong to no head
            one = graph.call_function(torch.ops.aten.new_ones.default, (mask, [1]))
            mask = graph.call_function(torch.ops.aten.cat.default, ([mask, one],))
        factor = graph.call_function(torch.ops.aten.index.Tensor, (mask, [place]))
        product = graph.call_function(torch.ops.aten.mul.Tensor, (isolated.node, factor))
        merged = isolated.merged(product)
        merged.meta["val"] = operand.meta["val"]
        user.replace_input_with(operand, merged)
        return merged


def _head_of_each_position(placed: Placed[Site], dims: Dims) -> torch.Tensor:
    """LongTensor that broadcasts against `dims`: head numbers, ``len(heads)`` for none."""
    axes = list(dict.fromkeys(axis for head in placed.heads for axis in head))
    carrying = [bool(set(leaves(dim)) & set(axes)) for dim in dims]
    sizes = [size(dim) if has else 1 for dim, has in zip(dims, carrying, strict=True)]
    code = torch.zeros(sizes, dtype=torch.long)
    for axis in axes:
        code = code * (axis.size + 1) + _coordinate_grid(axis, dims, carrying) + 1
    numbers = {_code(head, axes): number for number, head in enumerate(placed.heads)}
    flat = [numbers.get(value, len(placed.heads)) for value in code.flatten().tolist()]
    return torch.tensor(flat, dtype=torch.long).reshape(sizes)


def _coordinate_grid(axis: Axis, dims: Dims, carrying: list[bool]) -> torch.Tensor:
    """Coordinates along `axis`, shaped to broadcast over the dimensions that carry heads."""
    grid = torch.full((1,) * len(dims), -1)
    for position, (dim, has) in enumerate(zip(dims, carrying, strict=True)):
        if has:
            line = [1] * len(dims)
            line[position] = size(dim)
            grid = torch.maximum(grid, torch.tensor(coordinates(dim, axis)).reshape(line))
    return grid


def _code(head: Head, axes: Sequence[Axis]) -> int:
    """A number for a head's coordinates: mixed radix, 0 where it has none along an axis."""
    value = 0
    for axis in axes:
        value = value * (axis.size + 1) + head.get(axis, -1) + 1
    return value
