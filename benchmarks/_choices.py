"""Ways to choose heads: the library's criteria, other libraries' on the same masks, and chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

import fxslim
from fxslim import AttentionSite, Criterion, Projection
from fxslim.criteria import Magnitude, Random
from fxslim.magnitudes import per_head, slices
from fxslim.targets import Scope

__all__ = ["Choice", "GroupMagnitude", "choices"]


@dataclass(frozen=True)
class Choice:
    """A criterion and how the heads of different attentions are compared.

    Attributes:
        name: As in ``--criterion`` and in the tables.
        criterion: What scores the heads.
        scope: As in `fxslim.plan`.
        seed: Tells the draws of chance apart.
    """

    name: str
    criterion: Criterion
    scope: Scope = "global"
    seed: int | None = None


@dataclass(frozen=True)
class GroupMagnitude:
    """Torch-Pruning's default: `GroupMagnitudeImportance` with p=2, means throughout.

    The squared weights of a channel are summed in each layer and averaged over the layers that are
    pruned together (here query, key, value and output); a head's importance is the mean over its
    channels, relative to the mean of its attention. Biases do not count.
    """

    def score(
        self,
        masked: nn.Module,
        sites: Sequence[AttentionSite],
        calibration: Iterable[object] | None = None,
        loss_fn: object = None,
    ) -> dict[str, Tensor]:
        """Needs no data."""
        state = masked.state_dict(keep_vars=True)
        scores = {}
        for site in sites:
            layers = (*site.query, *site.key, *site.value, *site.output)
            total = sum(_squares(state, layer) for layer in layers)
            assert isinstance(total, Tensor)
            scores[site.name] = total / total.mean()
        return scores


def _squares(state: dict[str, Tensor], layer: Projection) -> Tensor:
    """The squares of a head's weights (heads,); those of a KV head count for each of its heads."""
    rows = slices(state[layer.weight].detach(), layer)
    return per_head(rows.square().sum((1, 2)).cpu(), layer)


def choices(names: Sequence[str], seeds: int, scope: Scope) -> list[Choice]:
    """The choices of these names; all of them where there are none.

    Args:
        names: Names in `fxslim.CRITERIA`, or of a rival.
        seeds: How often "random" draws.
        scope: For the library's own criteria; rivals have theirs.

    Raises:
        ValueError: An unknown name.
    """
    known = {name: [Choice(name, found, scope)] for name, found in fxslim.CRITERIA.items()}
    known |= {choice.name: [choice] for choice in RIVALS}
    known["random"] = [Choice("random", Random(seed), seed=seed) for seed in range(seeds)]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown criterion {unknown[0]!r}; known: {', '.join(known)}")
    return [choice for name in names or known for choice in known[name]]


RIVALS = [
    Choice("torch-pruning", GroupMagnitude(), "local"),
    Choice("torch-pruning-global", GroupMagnitude(), "global"),
    Choice("inc", Magnitude(), "global"),
    Choice("inc-local", Magnitude(), "local"),
]
"""Torch-Pruning takes the same share of every attention by default; Intel Neural Compressor (INC)
compares all of them, by the mean magnitude of a head's weights."""
