"""Selecting: at which uses an attention selects its heads, because others need the operand whole.

An operand that is selected from stays as wide as it is, and shares no axis with its other uses.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from torch import fx

from fxslim import graph
from fxslim.analysis import AxisMap, Select, Use
from fxslim.axes import Axis, Block, block, leaves, resolve
from fxslim.calls import Contraction
from fxslim.cores import Core
from fxslim.follow import closure
from fxslim.placed import Attention
from fxslim.positions import coordinates
from fxslim.weights import Weights

__all__ = ["ROLES", "block_mixed", "operands_of", "read_beside", "repeated", "side_operands"]

Roles = tuple[str, ...]

ROLES: tuple[Roles, ...] = (
    ("query",), ("key",), ("value",), ("query", "key"), ("query", "value"), ("key", "value"),
)  # fmt: skip
"""From which operands an attention may select its heads, fewest first."""


def block_mixed(axis_map: AxisMap, weights: Weights, cores: Sequence[Core]) -> None:
    """Block the head axes that something else than an output projection sums over.

    What a projection sums the context with, head by head, may be more than a weight (a router).
    """
    ended: dict[fx.Node, set[Axis]] = {}
    for node, contraction in (end for core in cores for end in core.ends):
        ended.setdefault(node, set()).update(leaves(contraction.dim))
    heads = {leaf for core in cores for leaf in core.heads}
    for node, contractions in axis_map.contractions.items():
        why = Block("mixes the heads before their context is complete", node.name)
        for c in contractions:
            if not weights.is_weight(c.operand):
                block(tuple(heads.intersection(leaves(c.dim)) - ended.get(node, set())), why)


def side_operands(axis_map: AxisMap, attentions: Sequence[Sequence[Core]]) -> set[Use]:
    """Operands that carry an attention's heads, and that others share or read as a whole.

    T5's position bias is owned by one layer and used by all: selecting where it is used leaves
    every layer free to keep other heads.  Layers that share their weights stay together anyway,
    unless they select from what these make.
    A grouped convolution that has a group for each head ties the heads to its input's channels.
    """
    cores = [core for attention in attentions for core in attention]
    owners: dict[fx.Node, set[frozenset[fx.Node]]] = {}
    for attention in attentions:
        own = {core.node: _own(axis_map, core) for core in attention}
        together = frozenset[fx.Node]().union(*own.values())
        for core in attention:
            for node in frozenset[fx.Node]().union(*core.side.values()):
                owners.setdefault(node, set()).add(own[core.node] if core.refusal else together)
    chosen: set[Use] = set()
    for core in cores:
        readers = _readers(core)
        for use, ancestors in core.side.items():
            shared = any(len(owners[node]) > 1 for node in ancestors)
            related = _related(ancestors, cores)
            if shared or any(n.name in readers for node in related for n in (node, *node.users)):
                chosen.add(use)
        if readers:
            chosen |= _grouped_inputs(axis_map, core)
    return chosen


def _own(axis_map: AxisMap, core: Core) -> frozenset[fx.Node]:
    """What a core's heads begin with: the query's weights, unless it selects from the query."""
    selects = any(use in axis_map.selected for use in core.uses["query"])
    return frozenset([core.node]) if selects or not core.weights else core.weights


def _readers(core: Core) -> set[str]:
    """The nodes that read a head axis as a whole; none if every head has another that is free."""
    free = [leaf for leaf in core.heads if not leaf.block]
    places = zip(*(coordinates(core.head_dim_factors, leaf) for leaf in free), strict=True)
    if free and all(max(place) >= 0 for place in places):
        return set()
    return {leaf.block.where for leaf in core.heads if leaf.block}


def _grouped_inputs(axis_map: AxisMap, core: Core) -> set[Use]:
    """The inputs of projections that keep the heads in the product, as those with groups do."""
    products = {product for pairs in core.projections.values() for _, product in pairs}
    weights = {weight for pairs in core.projections.values() for weight, _ in pairs}
    return {
        (product, c.operand)
        for product in products
        for c in axis_map.contractions.get(product, ())
        if c.operand not in weights
        and (_leaves_of(axis_map, product, c) - set(leaves(c.dim))) & set(core.heads)
    }


def _leaves_of(axis_map: AxisMap, user: fx.Node, contraction: Contraction) -> set[Axis]:
    """The leaves of the dimension of which `user` sums over some."""
    dims = axis_map.seen_by(user, contraction.operand)
    return set(leaves(dims[contraction.dimension]))


def _related(ancestors: frozenset[fx.Node], cores: Sequence[Core]) -> frozenset[fx.Node]:
    """`ancestors`, and those of the side operands made from the same values."""
    sides = (other for core in cores for other in core.side.values())
    return ancestors.union(*(other for other in sides if other & ancestors))


def operands_of(cores: Iterable[Core], roles: Roles, names: Container[str]) -> set[Use]:
    """Where the cores of these names use their queries, keys or values, as `roles` says."""
    found = (core for core in cores if core.node.name in names and core.heads)
    return {use for core in found for role in roles for use in core.uses[role]}


def read_beside(axis_map: AxisMap, core: Core) -> bool:
    """Whether the heads are read as a whole by others only, not on their way to the attention.

    A norm over all heads of the queries couples them: what one head is depends on all.  A value
    that is returned is read by the caller, and a weight by every layer that shares it.
    """
    readers = {leaf.block.where for leaf in core.heads if leaf.block}
    operands = [operand for uses in core.uses.values() for _, operand in uses]
    products = {product for pairs in core.projections.values() for _, product in pairs}

    def back(node: fx.Node) -> Iterable[fx.Node]:
        shared = node in axis_map.contractions and not axis_map.axes(node) & set(core.heads)
        return () if shared or node in products else node.all_input_nodes

    before = closure(operands, back)
    returned = set(core.node.graph.output_node().all_input_nodes)
    return readers.isdisjoint(node.name for node in before if node not in returned)


def repeated(axis_map: AxisMap, attention: Attention, cores: Sequence[Core]) -> dict[Use, Select]:
    """Where keys and values are used that are repeated for every query head, and along what.

    They are repeated by operators before that use, or by the attention itself.
    """
    if attention.within is None:
        return {}
    group, within = attention.units[0], attention.within
    found: dict[Use, Select] = {}
    for core in cores:
        if core.node.name not in attention.site.cores:
            continue
        for user, operand in (*core.uses["key"], *core.uses["value"]):
            own = [set(resolve(dim)) for dim in axis_map.seen_by(user, operand)]
            if {group, within} in own:
                found[user, operand] = Select(own.index({group, within}))
            elif {group} in own and graph.arguments(user).get("enable_gqa"):
                found[user, operand] = Select(own.index({group}), times=within.size)
            else:
                return {}  # the query heads of a group have a dimension of their own
    return found
