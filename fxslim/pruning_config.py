"""Pruning configs: Intel Neural Compressor's keys, as plain dicts, checked once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fxslim.errors import PlanError, UnsupportedSite, check_choice
from fxslim.head_scores import CRITERION_TYPES, REDUCTIONS
from fxslim.schedules import DECAYS, Schedule
from fxslim.sites import AttentionSite, FeedForwardSite, Site

__all__ = ["PATTERNS", "PruningConfig", "chosen_sites", "layer_names"]

PATTERNS: Mapping[str, type[AttentionSite] | type[FeedForwardSite]] = {
    "channelx1": FeedForwardSite,
    "mha": AttentionSite,
}
"""What can be pruned: the heads of attentions, or the channels of feed-forward blocks."""


@dataclass(frozen=True)
class PruningConfig:
    """One config, checked; `as_dict` is what the user sees and edits.

    Attributes:
        pattern: what is pruned, one of `PATTERNS`; in the following, channels are heads, too.
        op_names: the sites to prune, by their own names or those of their layers; what is no such
            name is a regular expression, searched for in them.  All sites, if there are none.
        excluded_op_names: sites to leave as they are, named in the same ways.
        target_sparsity: the share of heads to remove, in [0, 1); never more.
        start_step, end_step: optimizer steps done before the first pruning and before the last.
        pruning_frequency: optimizer steps from one pruning to the next.
        pruning_scope: "global" compares the heads of all sites, "local" takes the same share of
            each.
        criterion_type: one of `fxslim.head_scores.CRITERION_TYPES`.
        criterion_reduce_type: how a head's weights become one score: "mean", "sum" or "max".
        sparsity_decay_type: how sparsity grows, one of `fxslim.schedules.DECAYS`.
        min_sparsity_ratio_per_op: the share of each site's heads that goes, at least, rounded down;
            it grows as the sparsity does.
        max_sparsity_ratio_per_op: the share of each site's heads that goes, at most.
        rounding: each site keeps a multiple of so many heads.

    Raises:
        TypeError, ValueError: names the key and quotes what was given.
    """

    pattern: str = "mha"
    op_names: Sequence[str] = ()
    excluded_op_names: Sequence[str] = ()
    target_sparsity: float = 0.9
    start_step: int = 0
    end_step: int = 0
    pruning_frequency: int = 1
    pruning_scope: Any = "global"
    criterion_type: str = "snip_momentum"
    criterion_reduce_type: str = "mean"
    sparsity_decay_type: str = "exp"
    min_sparsity_ratio_per_op: float = 0.0
    max_sparsity_ratio_per_op: float = 0.98
    rounding: int = 1

    def __post_init__(self) -> None:
        for key, known in _CHOICES.items():
            check_choice(key, getattr(self, key), known)
        for key in _RATIOS:
            _check_number(key, getattr(self, key), (int, float), 0, 1)
        for key in ("start_step", "end_step"):
            _check_number(key, getattr(self, key), (int,), 0)
        for key in ("pruning_frequency", "rounding"):
            _check_number(key, getattr(self, key), (int,), 1)
        for key in ("op_names", "excluded_op_names"):
            _check_patterns(key, getattr(self, key))
        if self.end_step < self.start_step:
            raise ValueError(f"end_step ({self.end_step}) is before start_step ({self.start_step})")
        least, target = self.min_sparsity_ratio_per_op, self.target_sparsity
        if least > min(target, self.max_sparsity_ratio_per_op):
            raise ValueError(
                f"min_sparsity_ratio_per_op ({least}) is more than target_sparsity ({target}) or "
                f"max_sparsity_ratio_per_op ({self.max_sparsity_ratio_per_op})"
            )

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PruningConfig:
        """Check a dict; keys that are absent have INC's defaults.

        Raises:
            TypeError, ValueError: it is no dict, a key is unknown, or a value makes no sense.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"a pruning config must be a dict, not {config!r}")
        known = [field.name for field in fields(cls)]
        unknown = [key for key in config if key not in known]
        if unknown:
            raise ValueError(
                f"unknown pruning config keys {', '.join(map(repr, unknown))}; "
                f"known: {', '.join(known)}"
            )
        return cls(**config)

    def check_schedule(self) -> None:
        """Refuse a schedule that wants gradients before there are any.

        Raises:
            ValueError: says which keys to set.
        """
        if CRITERION_TYPES[self.criterion_type].needs_gradients and self.schedule.last == 0:
            raise ValueError(
                f"criterion_type={self.criterion_type!r} needs gradients, but the only pruning is "
                "before the first step: set end_step (in optimizer steps), and start_step for one "
                "pruning in the midst of the run; or criterion_type='magnitude'"
            )

    def as_dict(self) -> dict[str, Any]:
        """The config as a plain dict."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def schedule(self) -> Schedule:
        """When how many heads are gone."""
        return Schedule(
            self.target_sparsity,
            self.start_step,
            self.end_step,
            self.pruning_frequency,
            self.sparsity_decay_type,
        )


def chosen_sites(config: PruningConfig, sites: Sequence[Site]) -> list[Site]:
    """The prunable sites that a config names, without those that it excludes.

    Raises:
        PlanError: a name matches nothing, or a site is chosen without one that it is coupled to.
        UnsupportedSite: a site that is named in full cannot be pruned; says why.
    """
    sites = [site for site in sites if isinstance(site, PATTERNS[config.pattern])]
    for name in config.op_names:
        refused = next((s for s in sites if s.name == name and not s.prunable), None)
        if refused is not None:
            raise UnsupportedSite(f"{name!r} cannot be pruned: {refused.reason}")
    prunable = [site for site in sites if site.prunable]
    wanted = _named(config.op_names, prunable) if config.op_names else {s.name for s in prunable}
    wanted -= _named(config.excluded_op_names, sites)
    for site in (site for site in prunable if site.name in wanted):
        apart = [name for name in site.coupled if name not in wanted]
        if apart:
            raise PlanError(
                f"{site.name!r} must keep the same heads as {', '.join(map(repr, apart))}: name "
                "all of them in op_names, or exclude all of them"
            )
    return [site for site in prunable if site.name in wanted]


def layer_names(site: Site) -> list[str]:
    """The modules that hold a site's weights, by name."""
    return list(dict.fromkeys(p.weight.rpartition(".")[0] for p in site.projections))


def _named(names: Sequence[str], sites: Sequence[Site]) -> set[str]:
    """The sites that any of `names` names or matches."""
    found: set[str] = set()
    for name in names:
        own = {site.name: [site.name, *layer_names(site)] for site in sites}
        exact = {site for site, known in own.items() if name in known}
        matching = exact or {
            s for s, known in own.items() if any(re.search(name, k) for k in known)
        }
        if not matching:
            raise PlanError(
                f"{name!r} names no site and matches none; the sites are: {', '.join(own)}"
            )
        found |= matching
    return found


def _check_number(
    key: str, value: Any, kinds: tuple[type[float], ...], least: float, below: float = math.inf
) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds):
        whole = "" if float in kinds else "whole "
        raise TypeError(f"{key} must be a {whole}number, not {value!r}")
    if not least <= value < below:
        raise ValueError(f"{key} must be in [{least:g}, {below:g}), not {value!r}")


def _check_patterns(key: str, value: Any) -> None:
    if isinstance(value, str) or not all(isinstance(pattern, str) for pattern in value):
        raise TypeError(f"{key} must be a list of names or patterns, not {value!r}")
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{key}: {pattern!r} is no regular expression: {error}") from error


_CHOICES = {
    "pattern": tuple(PATTERNS),
    "pruning_scope": ("global", "local"),
    "criterion_type": tuple(CRITERION_TYPES),
    "criterion_reduce_type": tuple(REDUCTIONS),
    "sparsity_decay_type": tuple(DECAYS),
}
_RATIOS = ("target_sparsity", "min_sparsity_ratio_per_op", "max_sparsity_ratio_per_op")
