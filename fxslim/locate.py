"""Locate: attentions and feed-forward blocks, as sites that say what is cut together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from torch import fx, nn

from fxslim.analysis import Select, Use, analyse
from fxslim.cores import Core, find_cores
from fxslim.coupling import agreed, coupled
from fxslim.feed_forward import find_blocks
from fxslim.parts import parts_of
from fxslim.placed import Attention, Located
from fxslim.selecting import ROLES, block_mixed, operands_of, read_beside, repeated, side_operands
from fxslim.site_builder import SiteBuilder
from fxslim.sites import AttentionSite, FeedForwardSite, Unit
from fxslim.weights import Weights

__all__ = ["find_attention", "find_feed_forward", "locate", "locate_parts"]


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


def find_feed_forward(program: nn.Module) -> list[FeedForwardSite]:
    """Find every feed-forward block of a captured model, in the order of the graph.

    A block is a number of channels between projections from and back to the same stream, gated or
    not.  Its site goes where attentions' sites go: into `fxslim.insert_head_masks`, `fxslim.plan`.

    Args:
        program: what `fxslim.capture` returned.

    Returns:
        One site a block; those that cannot be pruned say why in `reason`.
    """
    parts = locate_parts(program, feed_forward=True)
    return [placed.site for located in parts.values() for placed in located.feed_forwards]


def locate_parts(
    program: nn.Module, *, unit: Unit = "group", feed_forward: bool = False
) -> dict[str, Located]:
    """The attentions of each part of a captured model, by the paths of the parts."""
    parts = parts_of(program).items()
    return {path: locate(part, unit=unit, feed_forward=feed_forward) for path, part in parts}


def locate(program: fx.GraphModule, *, unit: Unit = "group", feed_forward: bool = False) -> Located:
    """Find every attention and, if asked, every feed-forward block."""
    located, cores = _attentions(program, unit)
    if not feed_forward:
        return located
    weights = Weights(located.axis_map)
    blocks = find_blocks(located.axis_map, weights, cores)
    return replace(located, feed_forwards=tuple(blocks))


def _attentions(program: fx.GraphModule, unit: Unit) -> tuple[Located, list[Core]]:
    """Every attention, selecting from shared side operands where sites would be coupled."""
    select_at: dict[Use, Select] = {}
    located, cores = _separated(program, select_at)
    if unit != "any":
        return located, cores
    places = {
        use: select
        for attention in located.attentions
        for use, select in repeated(located.axis_map, attention, cores).items()
    }
    if not places:
        return located, cores
    single, cores_of_single = _separated(program, select_at | places)
    if not _same_heads(single, located):
        return located, cores
    return _as_projected(single, located), cores_of_single


def _same_heads(single: Located, located: Located) -> bool:
    """Whether the same sites can lose the same heads, so that a name in a plan means one thing."""
    one, other = (
        {site.cores: site.num_heads for site in found.sites if site.prunable}
        for found in (single, located)
    )
    return one == other


def _separated(program: fx.GraphModule, select_at: dict[Use, Select]) -> tuple[Located, list[Core]]:
    """The attentions, as many of them prunable as selecting makes; `select_at` gets the uses."""
    located, cores = _located(program, select_at)
    if all(site.prunable for site in located.sites):
        return located, cores
    return _freed(program, located, cores, select_at)


def _freed(
    program: fx.GraphModule, located: Located, cores: list[Core], select_at: dict[Use, Select]
) -> tuple[Located, list[Core]]:
    """The attentions, with those freed that need only select what something else reads, too.

    A layer over the values, a cache that is an output: what the attention selects its heads from
    stays whole.  `select_at` gets the uses at which it does.  Selections that free every head axis
    come before those that free query heads only.
    """
    refused = {name for site in located.sites if not site.prunable for name in site.cores}
    beside = (core for core in cores if core.heads and read_beside(located.axis_map, core))
    refused &= {core.node.name for core in beside}
    freed, partly = dict[str, set[Use]](), dict[str, set[Use]]()
    for roles in ROLES if refused else ():
        uses = {n: operands_of(cores, roles, {n}) for n in refused - freed.keys()} | freed
        trial, _ = _located(
            program, select_at | dict.fromkeys(set().union(*uses.values()), Select())
        )
        for attention in trial.attentions:
            names = refused.intersection(attention.site.cores) if attention.site.prunable else ()
            blocked = any(axis.block for head in attention.heads for axis in head)
            for name in names:
                (partly if blocked else freed).setdefault(name, uses[name])
        if refused == freed.keys():
            break
    if not freed and not partly:
        return located, cores
    select_at.update(dict.fromkeys(set().union(*(partly | freed).values()), Select()))
    result, cores = _located(program, select_at)
    return _as_projected(result, located), cores


def _as_projected(selecting: Located, located: Located) -> Located:
    """Attentions that select from their operands, with what is known of where these come from."""
    before = {attention.site.cores: attention.site for attention in located.attentions}
    attentions = (_described(a, before.get(a.site.cores)) for a in selecting.attentions)
    return replace(selecting, attentions=tuple(attentions))


def _described(attention: Attention, before: AttentionSite | None) -> Attention:
    """An attention with the projections that its site had before it selected its heads.

    Where selecting does not free it, it is refused for what it was refused for before.
    """
    site = attention.site
    if before is None or site.num_heads != before.num_heads:
        return attention
    if not site.prunable:
        return replace(attention, site=replace(site, reason=before.reason or site.reason))
    grouped = before if before.key or before.value else site
    site = replace(
        site,
        kind=grouped.kind,
        is_cross=before.is_cross,
        num_kv_heads=grouped.num_kv_heads,
        query=before.query,
        key=grouped.key,
        value=grouped.value,
    )
    return replace(attention, site=site)


def _located(program: fx.GraphModule, select_at: dict[Use, Select]) -> tuple[Located, list[Core]]:
    """The attentions, and their cores; `select_at` gets the uses that sites have to select at."""
    while True:
        axis_map = analyse(program, select_at)
        weights = Weights(axis_map)
        cores = find_cores(axis_map, weights)
        block_mixed(axis_map, weights, cores)
        groups = _by_output(cores)
        new = side_operands(axis_map, groups) - select_at.keys()
        if not new:
            break
        select_at.update(dict.fromkeys(new, Select()))
    builders = [SiteBuilder(axis_map, weights, group) for group in groups]
    return Located(axis_map, tuple(coupled(_number(agreed(builders))))), cores


def _by_output(cores: Sequence[Core]) -> list[list[Core]]:
    """Cores that end in the same output projection are one attention, if their heads are related.

    Two attentions whose contexts lie side by side before one projection have heads of their own.
    """
    groups: list[list[Core]] = []
    place: dict[fx.Node, list[list[Core]]] = {}
    for core in cores:
        beside = (group for node, _ in core.ends for group in place.get(node, ()))
        found = next((g for g in beside if any(_akin(core, c) for c in g)), None)
        if found is None:
            found = []
            groups.append(found)
        found.append(core)
        for node, _ in core.ends:
            place.setdefault(node, []).append(found)
    return groups


def _akin(core: Core, other: Core) -> bool:
    """Whether two cores share a head axis or a query's weight, or are one head each."""
    if not set(core.heads).isdisjoint(other.heads) or (core.is_single and other.is_single):
        return True
    ours, theirs = ({w.target for w in c.weights} for c in (core, other))
    return not ours.isdisjoint(theirs)


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
