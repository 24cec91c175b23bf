"""Padding: which positions of a batch anything attends to, as far as its masks tell.

What a padded position holds reaches no other position, and a fit that counts it is one to noise.
No input is called a mask here: a key to which no query attends is padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from fxslim import graph
from fxslim.analysis import AxisMap
from fxslim.axes import Axis, resolve
from fxslim.calls import Dims
from fxslim.examples import Inputs, as_inputs
from fxslim.locate import locate
from fxslim.matrices import Product
from fxslim.operands import normalised_dimension
from fxslim.placed import Located
from fxslim.rules import row_for
from fxslim.walk import Call, Walk

__all__ = ["Attended", "Tell", "Told", "telling"]


class Attended:
    """Finds the positions of a batch to which some query of a program attends."""

    def __init__(self, located: Located) -> None:
        self.axis_map = located.axis_map
        self.nodes = {node.name: node for node in located.axis_map.dims}
        self.masks = tuple(_masks(located, self.nodes))

    def __call__(self, call: Call) -> Told:
        """Run the program on one batch, as far as its masks."""
        if not self.masks:
            return Told()
        walk = Walk(self.axis_map.program, [call])
        with torch.no_grad():
            return Told(self, [mask.read(walk) for mask in self.masks])


class Told:
    """What the masks tell of one batch: nothing, where there are none."""

    def __init__(
        self, attended: Attended | None = None, values: Sequence[torch.Tensor] = ()
    ) -> None:
        self._attended, self._values = attended, values

    def operand(self, product: Product, value: torch.Tensor) -> torch.Tensor | None:
        """BoolTensor of the shape of a product's activation; None where no mask tells."""
        if self._attended is None:
            return None
        node = self._attended.nodes[product.node]
        operand = node.all_input_nodes[product.operand]
        return self._where(self._attended, self._attended.axis_map.seen_by(node, operand), value)

    def outputs(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """The same for each of the program's floating-point outputs, in order."""
        if self._attended is None:
            return [None] * len(values)
        axis_map = self._attended.axis_map
        given = axis_map.program.graph.output_node().all_input_nodes
        nodes = [n for n in given if graph.is_tensor(n) and n.meta["val"].is_floating_point()]
        if len(nodes) != len(values):  # one value may be returned twice
            return [None] * len(values)
        pairs = zip(nodes, values, strict=True)
        return [self._where(self._attended, axis_map.of(node), value) for node, value in pairs]

    def _where(self, attended: Attended, dims: Dims, value: torch.Tensor) -> torch.Tensor | None:
        for mask, told in zip(attended.masks, self._values, strict=True):
            found = mask.spread(told, dims, value.shape)
            if found is not None:
                return found
        return None


Tell = Callable[[Inputs], Told]
"""What the masks of a program tell of a batch; those of a model in parts, nothing."""


def telling(program: nn.Module) -> Tell:
    """What tells the padding of a (masked) program's batches."""
    if not isinstance(program, fx.GraphModule):
        return lambda batch: Told()
    attended = Attended(locate(program))
    return lambda batch: attended(as_inputs(batch))


@dataclass(frozen=True)
class _Mask:
    """A mask that is added to scores or selects from them, or the probabilities themselves.

    Attributes:
        node: the mask, or the core if it makes the probabilities.
        core: the node that makes the probabilities, or is the attention.
        along: the mask's dimension of the keys.
        kept: its dimensions that other values have and that stay as they are, the keys last.
        positions: the axes that each of these goes by.
    """

    node: fx.Node
    core: fx.Node
    along: int
    kept: tuple[int, ...]
    positions: tuple[frozenset[Axis], ...]

    def read(self, walk: Walk) -> torch.Tensor:
        """Truth values, of the dimensions that are kept."""
        is_core = self.node is self.core
        walk.advance(self.core.next if is_core else self.core)
        value = walk.value(self.node, 0)
        if value.dtype != torch.bool:
            value = (value if is_core else value.float().softmax(self.along)) > 0
        return _any(value, self.kept)

    def spread(self, told: torch.Tensor, dims: Dims, shape: torch.Size) -> torch.Tensor | None:
        """What was read, for a value of these dims; None where it does not have the keys."""
        layout: list[tuple[int | None, int]] = []
        for dim, n in zip(dims, shape, strict=True):
            places = [(self._place_of(axis), axis.size) for axis in resolve(dim)]
            if all(place is None for place, _ in places):
                layout.append((None, n))
            else:
                layout += [(at, size if at is None else told.shape[at]) for at, size in places]
        kept = [place for place, _ in layout if place is not None]
        fits = math.prod(n for _, n in layout) == shape.numel()
        if len(self.kept) - 1 not in kept or len(set(kept)) < len(kept) or not fits:
            return None
        found = _any(told, kept)
        for number, (place, _) in enumerate(layout):
            if place is None:
                found = found.unsqueeze(number)
        return found.expand([n for _, n in layout]).reshape(shape)

    def _place_of(self, axis: Axis) -> int | None:
        """Which of what is kept goes by an axis; the keys before others."""
        places = reversed(range(len(self.kept)))
        return next((place for place in places if axis in self.positions[place]), None)


def _masks(located: Located, nodes: dict[str, fx.Node]) -> Iterator[_Mask]:
    """The first mask of each length that is attended to and that activations have."""
    axis_map, known = located.axis_map, set[Axis]()
    activations = [
        axis_map.axes(contraction.operand)
        for contractions in axis_map.contractions.values()
        for contraction in contractions
    ]
    for core in (nodes[name] for site in located.sites for name in site.cores):
        found = _mask_of(axis_map, core)
        if found is None:
            continue
        node, along = found
        positions = [frozenset(axis_map.same_positions(dim)) for dim in axis_map.of(node)]
        keys = positions[along]
        beside = set().union(*(axes for axes in activations if axes & keys))
        if not beside or keys & known:
            continue
        known |= keys
        others = (
            d
            for d, axes in enumerate(positions)
            if axes & beside and not axes & keys and all(axis.block for axis in axes)
        )
        kept = (*others, along)
        yield _Mask(node, core, along, kept, tuple(positions[d] for d in kept))


def _mask_of(axis_map: AxisMap, core: fx.Node) -> tuple[fx.Node, int] | None:
    """What tells which keys a core attends to, and its dimension of the keys."""
    row = row_for(core)
    if row is not None and row.probability:
        return core, normalised_dimension(axis_map, core)
    mask = graph.arguments(core).get("attn_mask")
    return (mask, len(axis_map.of(mask)) - 1) if isinstance(mask, fx.Node) else None


def _any(values: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """Whether any is true over all other dimensions; those kept in the order given."""
    moved = values.permute(*kept, *(d for d in range(values.ndim) if d not in kept))
    return moved.reshape(*moved.shape[: len(kept)], -1).any(-1)
