"""From the cores of one attention to a site: its heads, its projections, or why it is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from torch import fx

from fxslim import graph
from fxslim.analysis import AxisMap
from fxslim.axes import Axis, Dim, leaves
from fxslim.cores import Core
from fxslim.parts import full_name
from fxslim.placed import Attention, Head, positions_along
from fxslim.positions import coordinates, tells_groups
from fxslim.refusals import ONE_HEAD
from fxslim.sites import AttentionSite, Projection
from fxslim.weights import Weights

__all__ = ["SiteBuilder", "blocked_by"]


class SiteBuilder:
    """Turns the cores of one attention into a site."""

    def __init__(self, axis_map: AxisMap, weights: Weights, cores: Sequence[Core]) -> None:
        self.axis_map = axis_map
        self.weights = weights
        self.cores = cores
        self.leaves = list(dict.fromkeys(leaf for core in cores for leaf in core.heads))
        self.carried = self._carried()
        self.heads = self._heads()
        self.partial: list[fx.Node] = []
        ends = {(node, c.operand, c.dimension): c for core in cores for node, c in core.ends}
        self.ends = tuple((node, c) for (node, _, _), c in ends.items())

    def build(self, carriers: Mapping[Axis, int]) -> Attention:
        """The site, prunable or with the reason why not.

        Args:
            carriers: how many attentions have an axis in common to all their keys and values.
        """
        query, key = self._projections("query"), self._projections("key")
        value, output = self._projections("value"), self._outputs()
        reason = self._refusal()
        units = () if reason else tuple(self._unit(head, carriers) for head in self.heads)
        within = self._within(units)
        groups: dict[tuple[Axis, int], list[int]] = {}
        for number, (head, axis) in enumerate(zip(self.heads, units, strict=False)):
            groups.setdefault((axis, head[axis]), []).append(number)
        kv_heads = max(_distinct(key), _distinct(value))
        num_heads = max(len(self.heads), 1)
        site = AttentionSite(
            name=self._name([*query, *key, *value, *output]),
            kind="mha" if kv_heads == num_heads else "gqa" if kv_heads > 1 else "mqa",
            is_cross=any(core.is_cross for core in self.cores),
            num_heads=num_heads,
            num_kv_heads=kv_heads,
            head_dim=self.cores[0].head_dim,
            query=query,
            key=key,
            value=value,
            output=output,
            unit=tuple(tuple(group) for group in groups.values()),
            uneven=within is not None,
            coupled=(),
            prunable=not reason,
            reason=reason,
            cores=tuple(core.node.name for core in self.cores),
        )
        return Attention(site, tuple(self.heads), units, within, self.ends)

    # -------------------------------------------------------------------------------------- heads

    def _heads(self) -> list[Head]:
        """Every combination of coordinates that occurs along the head axes, in order."""
        found: dict[tuple[int, ...], Head] = {}
        for core in self.cores:
            for coordinate in zip(*(_along(core, leaf) for leaf in self.leaves), strict=True):
                head = {a: c for a, c in zip(self.leaves, coordinate, strict=True) if c >= 0}
                if head:
                    found.setdefault(coordinate, head)
        return list(found.values())

    def _unit(self, head: Head, carriers: Mapping[Axis, int]) -> Axis:
        """The axis along which a head is removed: the one its KV head has too, if that is free."""
        free = [axis for axis in head if not axis.block]
        return max(free, key=lambda a: (a in self.carried, carriers.get(a, 0), a.size))

    def _carried(self) -> set[Axis]:
        """The head axes that all weights of keys and values have: query heads may share them."""
        roles = [core.projections[role] for core in self.cores for role in ("key", "value")]
        weights = {weight for pairs in roles for weight, _ in pairs}
        dims = [dim for weight in weights for dim in self.axis_map.of(weight)]
        found = [set(_shared(carried, dim)) for dim in dims if (carried := self._leaves_in(dim))]
        return set.intersection(*found) if found else set()

    def _leaves_in(self, dim: Dim) -> list[Axis]:
        """The head axes that a dimension carries."""
        found = set(leaves(dim))
        return [leaf for leaf in self.leaves if leaf in found]

    def _within(self, units: Sequence[Axis]) -> Axis | None:
        """The axis of the query heads within a KV group, if each group can keep others."""
        if len(set(units)) != 1 or len(self.leaves) != 2:
            return None
        (group,) = set(units)
        (axis,) = set(self.leaves) - {group}
        if axis.block or len(self.heads) != group.size * axis.size:
            return None
        origins = self.weights.origins[axis]
        return axis if all(tells_groups(dim, axis, group) for dim in origins) else None

    # ------------------------------------------------------------------------------------ refusal

    def _refusal(self) -> str:
        """Why no head can be removed; empty if they can."""
        for core in self.cores:
            if core.refusal:
                return core.refusal
        if len(self.heads) < 2:
            return ONE_HEAD
        for head in self.heads:
            if all(axis.block for axis in head):
                return blocked_by(self.axis_map, next(iter(head)), "the head axis")
        if not self.ends:
            return "no output projection sums over its heads"
        for node, contraction in self.ends:
            if self.weights.summed_with(node, contraction) is None:
                return f"{graph.user_name(node)} sums over the heads without a weight"
        if self.partial:
            return f"{self.partial[0].target} does not have as many positions for every head"
        return ""

    # -------------------------------------------------------------------------------- projections

    def _projections(self, role: str) -> tuple[Projection, ...]:
        found: dict[str, Projection] = {}
        for core in self.cores:
            for weight, user in core.projections[role]:
                for projection in self._project(weight, user, own=role == "query"):
                    found.setdefault(projection.weight, projection)
        return tuple(found.values())

    def _outputs(self) -> tuple[Projection, ...]:
        found: dict[tuple[str, int], Projection] = {}
        for node, contraction in self.ends:
            for weight, summed in (self.weights.summed_with(node, contraction) or {}).items():
                for projection in self._project(weight, node, summed=summed):
                    found.setdefault((projection.weight, projection.dim), projection)
        return tuple(found.values())

    def _project(
        self,
        weight: fx.Node,
        user: fx.Node,
        *,
        own: bool = True,
        summed: Sequence[int] | None = None,
    ) -> Iterable[Projection]:
        """`weight` as a projection: of every head's own positions, or of those that heads share.

        An output projection is one by the dimensions that are `summed` over.
        """
        bias = self.weights.bias_of(user, weight) if summed is None else None
        every = list(range(len(self.heads)))
        for position, dim in enumerate(self.axis_map.of(weight)):
            carried = self._leaves_in(dim)
            if carried and (summed is None or position in summed):
                shared = carried if own else _shared(carried, dim)
                others = [leaf for leaf in carried if leaf not in shared]
                found = positions_along(self.heads, shared, dim, others)
                if found is None or (summed and sorted(set(found[1].tolist())) != every):
                    self.partial.append(weight)
                    continue
                bias = bias and full_name(self.axis_map.program, bias)
                name = full_name(self.axis_map.program, str(weight.target))
                yield Projection(name, bias, position, *found)

    # --------------------------------------------------------------------------------------- name

    def _name(self, projections: Sequence[Projection]) -> str:
        """The module whose code the attention is; where that is not known, that of its weights.

        PyTorch forgets the modules inside of a region with autocast or without gradients.
        """
        nodes = [core.node for core in self.cores] + [node for node, _ in self.ends]
        program = self.axis_map.program
        path = _common([graph.module_path(n) for n in nodes]) or graph.module_path(nodes[0])
        owners = [projection.weight.rpartition(".")[0] for projection in projections]
        found = full_name(program, path) if path else _common(owners)
        return found or full_name(program, "") or "attention"


def _common(paths: Sequence[str]) -> str:
    """The longest path that all begin with."""
    columns = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, columns))


def blocked_by(axis_map: AxisMap, axis: Axis, what: str) -> str:
    """What reads `axis` as a whole, in words that call it `what`."""
    assert axis.block is not None
    node = next((n for n in axis_map.dims if n.name == axis.block.where), None)
    if axis.block.unruled and node is not None:
        return (
            f"{graph.user_name(node)}: {axis.block.why}, so its effect on the heads is "
            "unknown; a row in fxslim/rules.py makes it known"
        )
    where = graph.user_name(node) if node is not None else "the graph"
    if axis.block.why.startswith("is "):
        return f"{what} {axis.block.why}: {where}; capture the model without it"
    return f"{where} {axis.block.why.replace(' it', f' {what}', 1)}"


def _distinct(projections: Sequence[Projection]) -> int:
    """How many heads are told apart by their rows in weights."""
    return len(set(zip(*(p.row_of.tolist() for p in projections), strict=True))) or 1


def _along(core: Core, leaf: Axis) -> list[int]:
    """For each position of the core's head factors, the coordinate along `leaf`."""
    return coordinates(core.head_dim_factors, leaf)


def _shared(carried: Sequence[Axis], dim: Dim) -> Sequence[Axis]:
    """The leaves that a fused weight's keys carry: fewer than its queries, if those are grouped."""
    columns = zip(*(coordinates(dim, leaf) for leaf in carried), strict=True)
    kinds = {tuple(at for at, c in enumerate(place) if c >= 0) for place in columns}
    fewer = [kind for kind in kinds if kind and any(set(kind) < set(other) for other in kinds)]
    return [carried[at] for at in min(fewer, key=len)] if fewer else carried
