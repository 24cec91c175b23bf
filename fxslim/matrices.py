"""Products with a weight as what they are: rows times a matrix.

An output projection may be a Linear, an einsum over (head, head dim) or a convolution of one
position.  Each is a matrix product once the dimensions that are summed over are called features
and those that the weight brings in are called outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxslim.axes import leaves
from fxslim.calls import Contraction, Dims
from fxslim.weights import Weights

__all__ = ["Product", "as_matrix", "product_of"]


@dataclass(frozen=True)
class Product:
    """A node that multiplies an activation by a weight.

    Attributes:
        node: the name of the product in the graph.
        operand: the place of the activation among the node's inputs.
        weight: the place of the weight among them.
        features: the activation's dimensions that are summed over.
        rows: its other dimensions, in the order that the result has them.
        weight_features: the weight's, in the same order.
        outputs: the result's dimensions that the weight brings in.
    """

    node: str
    operand: int
    weight: int
    features: tuple[int, ...]
    rows: tuple[int, ...]
    weight_features: tuple[int, ...]
    outputs: tuple[int, ...]


def product_of(weights: Weights, node: fx.Node, operand: fx.Node) -> Product | None:
    """`node` as the product of `operand` with a weight; None where it is something else."""
    contractions = weights.axis_map.contractions.get(node, ())
    data = [c for c in contractions if c.operand is operand]
    others = [c for c in contractions if c.operand is not operand]
    weight = others[0].operand if others else operand
    if not data or len({c.operand for c in others}) != 1 or not weights.is_weight(weight):
        return None
    partners = [next((o for o in others if _same(c, o)), None) for c in data]
    if len(others) != len(data) or not all(_whole(weights, node, c) for c in contractions):
        return None
    matched = [partner.dimension for partner in partners if partner is not None]
    brought = {
        leaf
        for d, dim in enumerate(weights.axis_map.seen_by(node, weight))
        for leaf in leaves(dim)
        if d not in matched
    }
    result = weights.axis_map.of(node)
    outputs = tuple(d for d, dim in enumerate(result) if brought & set(leaves(dim)))
    features = tuple(c.dimension for c in data)
    rows = _rows(weights.axis_map.seen_by(node, operand), features, result, outputs)
    inputs = node.all_input_nodes
    if rows is None or not len(set(matched)) == len(matched) == len(data) or not outputs:
        return None
    return Product(
        node.name,
        inputs.index(operand),
        inputs.index(weight),
        features,
        rows,
        tuple(matched),
        outputs,
    )


def _rows(
    operand: Dims, features: Sequence[int], result: Dims, outputs: Sequence[int]
) -> tuple[int, ...] | None:
    """The dimensions of `operand` that are no features, in the order of the result's."""
    left = [d for d in range(len(operand)) if d not in features]
    rows: list[int] = []
    for dim in (dim for d, dim in enumerate(result) if d not in outputs):
        found = next((d for d in left if list(leaves(operand[d])) == list(leaves(dim))), None)
        if found is not None:
            left.remove(found)
            rows.append(found)
    return None if left else tuple(rows)


def _same(one: Contraction, other: Contraction) -> bool:
    return list(leaves(one.dim)) == list(leaves(other.dim))


def _whole(weights: Weights, node: fx.Node, contraction: Contraction) -> bool:
    """Whether a dimension is summed over entirely, not within groups."""
    dims = weights.axis_map.seen_by(node, contraction.operand)
    return list(leaves(dims[contraction.dimension])) == list(leaves(contraction.dim))


def as_matrix(
    tensor: torch.Tensor, columns: Sequence[int], rows: Sequence[int] | None = None
) -> torch.Tensor:
    """`tensor` as (rows, columns): the named dimensions, in that order; all others are rows."""
    if rows is None:
        rows = [d for d in range(tensor.ndim) if d not in columns]
    sizes = [tensor.shape[d] for d in columns]
    return tensor.permute(*rows, *columns).reshape(-1, math.prod(sizes))
