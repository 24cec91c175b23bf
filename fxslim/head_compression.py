"""One attention of the model that is trained: its site, its mask, its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from fxslim.masks import head_masks
from fxslim.pruning_config import layer_names
from fxslim.sites import Site
from fxslim.training_masks import parameter

__all__ = ["HeadCompression", "Masks", "ProgramMasks"]


class Masks(Protocol):
    """The masks that a model reads."""

    @property
    def model(self) -> nn.Module:
        """The model."""

    def mask(self, site: str) -> torch.Tensor:
        """The mask (heads,) of a site, to be written to."""


@dataclass(frozen=True)
class ProgramMasks:
    """The masks of a masked program."""

    model: nn.Module

    def mask(self, site: str) -> torch.Tensor:
        """The mask (heads,) of a site."""
        return head_masks(self.model, [site])[site]


@dataclass(frozen=True, eq=False)
class HeadCompression:
    """One attention of the model that is trained.

    Attributes:
        site: what the analysis knows of it.
        masks: the masks of the model.
    """

    site: Site
    masks: Masks

    @property
    def mask(self) -> torch.Tensor:
        """(heads,), 1 for heads that stay and 0 for the others; the model reads it."""
        return self.masks.mask(self.site.name).detach()

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The modules that hold its weights, by name."""
        return {name: self.masks.model.get_submodule(name) for name in layer_names(self.site)}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters that carry the heads, by name, as they are without the mask."""
        names = dict.fromkeys(projection.weight for projection in self.site.projections)
        return {name: parameter(self.masks.model, name) for name in names}
