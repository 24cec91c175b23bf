"""Locate: every attention of a program, as sites that say which of them are cut together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import fx, nn

from fxslim.analysis import AxisMap, Use, analyse
from fxslim.axes import Axis, leaves, resolve
from fxslim.calls import Contraction
from fxslim.cores import Core, find_cores
from fxslim.parts import parts_of
from fxslim.site_builder import SiteBuilder
from fxslim.sites import Attention, AttentionSite, Located, Unit
from fxslim.weights import Weights

__all__ = ["find_attention", "locate", "locate_parts"]


def find_attention(program: nn.Module, *, unit: Unit = "group") -> list[AttentionSite]:
    """Find every attention of a captured model, in the order of the graph.

    Args:
        program: what `fxslim.capture` returned.
        unit: with "any", heads of grouped queries are units by themselves where keys and values are
            repeated for them, so that they can be selected there.

    Returns:
        One site an attention; those that cannot be pruned say why in `reason`.
    """
    parts = locate_parts(program, unit=unit)
    return [site for located in parts.values() for site in located.sites]


def locate_parts(program: nn.Module, *, unit: Unit = "group") -> dict[str, Located]:
    """The attentions of each part of a captured model, by the paths of the parts."""
    return {path: locate(part, unit=unit) for path, part in parts_of(program).items()}


def locate(program: fx.GraphModule, *, unit: Unit = "group") -> Located:
    """Find every attention, selecting from shared side operands where sites would be coupled."""
    select_at: dict[Use, int | None] = {}
    located, cores = _located(program, select_at)
    if unit != "any":
        return located
    repeated = {
        use: dimension
        for attention in located.attentions
        for use, dimension in _repeated(located.axis_map, attention, cores).items()
    }
    if not repeated:
        return located
    single, _ = _located(program, select_at | repeated)
    return Located(single.axis_map, tuple(map(_as_grouped, single.attentions, located.attentions)))


def _located(
    program: fx.GraphModule, select_at: dict[Use, int | None]
) -> tuple[Located, list[Core]]:
    """The attentions, and their cores; `select_at` gets the uses that sites have to select at."""
    while True:
        axis_map = analyse(program, select_at)
        weights = Weights(axis_map)
        cores = find_cores(axis_map, weights)
        new = _uses_to_select(axis_map, cores) - select_at.keys()
        if not new:
            break
        select_at.update(dict.fromkeys(new))
    groups = _by_output(cores)
    attentions = [SiteBuilder(axis_map, weights, group, cores).build() for group in groups]
    return Located(axis_map, tuple(_couple(_number(attentions)))), cores


def _repeated(
    axis_map: AxisMap, attention: Attention, cores: Sequence[Core]
) -> dict[Use, int | None]:
    """Where keys and values are used that are repeated for every query head, and along what."""
    if attention.within is None:
        return {}
    heads = {attention.units[0], attention.within}
    found: dict[Use, int | None] = {}
    for core in cores:
        if core.node.name not in attention.site.cores:
            continue
        for user, operand in core.shared:
            dims = enumerate(axis_map.seen_by(user, operand))
            place = next((d for d, dim in dims if set(resolve(dim)) == heads), None)
            if place is None:
                return {}  # the query heads of a group have a dimension of their own
            found[user, operand] = place
    return found


def _as_grouped(single: Attention, grouped: Attention) -> Attention:
    """An attention whose heads are units, with what grouping says about keys and values."""
    site = replace(
        single.site,
        kind=grouped.site.kind,
        num_kv_heads=grouped.site.num_kv_heads,
        key=grouped.site.key,
        value=grouped.site.value,
    )
    return replace(single, site=site)


def _uses_to_select(axis_map: AxisMap, cores: Sequence[Core]) -> set[Use]:
    """Operands that carry a site's heads, and that others share or read as a whole.

    T5's position bias is owned by one layer and used by all: selecting where it is used leaves
    every layer free to keep other heads.  Layers that share their weights stay together anyway.
    A grouped convolution that has a group for each head ties the heads to its input's channels.
    """
    owners: dict[fx.Node, set[frozenset[fx.Node]]] = {}
    for core in cores:
        for ancestors in core.side.values():
            for node in ancestors:
                owners.setdefault(node, set()).add(core.weights)
    chosen: set[Use] = set()
    for core in cores:
        readers = {leaf.block.where for leaf in core.heads if leaf.block}
        for use, ancestors in core.side.items():
            shared = any(len(owners[node]) > 1 for node in ancestors)
            if shared or any(node.name in readers for node in _related(ancestors, cores)):
                chosen.add(use)
        if readers:
            chosen |= _grouped_inputs(axis_map, core)
    return chosen


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


def _by_output(cores: Sequence[Core]) -> list[list[Core]]:
    """Cores whose contexts end in the same output projection are one attention."""
    groups: list[list[Core]] = []
    place: dict[fx.Node, list[Core]] = {}
    for core in cores:
        found = next((place[node] for node, _ in core.ends if node in place), None)
        if found is None:
            found = []
            groups.append(found)
        found.append(core)
        for node, _ in core.ends:
            place[node] = found
    return groups


def _number(attentions: Sequence[Attention]) -> list[Attention]:
    """Unique names: the second call of a layer is ``name@2``."""
    seen: Counter[str] = Counter()
    out = []
    for attention in attentions:
        name = attention.site.name
        seen[name] += 1
        if seen[name] > 1:
            name = f"{name}@{seen[name]}"
        out.append(replace(attention, site=replace(attention.site, name=name)))
    return out


def _couple(attentions: Sequence[Attention]) -> list[Attention]:
    """Tell each site which others are cut along the same axis."""
    users: dict[Axis, list[str]] = {}
    for attention in attentions:
        for axis in dict.fromkeys(attention.units):
            users.setdefault(axis, []).append(attention.site.name)
    out = []
    for attention in attentions:
        names = [n for axis in dict.fromkeys(attention.units) for n in users[axis]]
        others = tuple(n for n in dict.fromkeys(names) if n != attention.site.name)
        out.append(replace(attention, site=replace(attention.site, coupled=others)))
    return out
