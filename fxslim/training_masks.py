"""Head masks on the model that is trained, where it reads the weights of its output projections.

A mask m multiplies the context c of each head.  Where the context meets the output projection W,
W (m ∘ c) = (W ∘ m) c: masking the columns of W is the same, wherever and however the model uses W.
So the attribute that holds W gives W ∘ m when it is read, while the parameter keeps its name, its
values and its place in the state dict.  No forward hook is involved: whatever calls, compiles,
recomputes or wraps the model reads the attribute.

Masks are buffers (or parameters) of the model itself: a submodule would be one more layer of an
`nn.Sequential`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import nn

from fxslim.examples import Inputs
from fxslim.masks import mask_name
from fxslim.reading import read_as_they_are_, read_through_
from fxslim.sites import Projection, Site

__all__ = [
    "HeadMasks",
    "SiteMasks",
    "drop_state_",
    "masks_of",
    "multiplied",
    "owner_of",
    "parameter",
    "projections_to_mask",
    "state_name",
]

_MASKS, _STATE = "_site_masks", "head_masks/"


def state_name(site: str, kind: str = "") -> str:
    """The name of a site's mask, or what belongs to it, among the buffers of the model."""
    path = mask_name(site).removeprefix("head_masks.")
    return f"{_STATE}{path}/{kind}" if kind else f"{_STATE}{path}"


class SiteMasks:
    """The masks of some attentions of a model, which it reads once they are attached.

    Attributes:
        model: the model.
        sites: the attentions, by name.
        example_inputs: what they were found with, if the user passed any.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        example_inputs: Inputs | None = None,
    ) -> None:
        self.model, self.sites = model, {site.name: site for site in sites}
        self.example_inputs = example_inputs

    def mask(self, site: str) -> torch.Tensor:
        """The mask (heads,) of a site."""
        raise NotImplementedError

    def add_state_(self) -> None:
        """Give the model the buffers and parameters that `mask` reads."""
        raise NotImplementedError

    def factor(self, site: str, number: int) -> torch.Tensor:
        """What a site's output projection of this number is multiplied by."""
        return _factor(self.mask(site), self.state(site, f"index{number}"))

    def state(self, site: str, kind: str = "") -> torch.Tensor:
        """What belongs to a site among the buffers and parameters of the model."""
        return cast(torch.Tensor, getattr(self.model, state_name(site, kind)))

    def attach_(self) -> Self:
        """Let the model read its output projections through the masks.

        Raises:
            ValueError: the model has masks already.
        """
        if masks_of(self.model) is not None:
            raise ValueError(
                f"{type(self.model).__name__} has head masks already: a model is prepared for "
                "pruning once; go on with what that returned, or take a fresh copy of the model"
            )
        places: dict[int, tuple[tuple[str, int], ...]] = {}
        for site, number, projection in projections_to_mask(self.sites.values()):
            weight = parameter(self.model, projection.weight)
            heads = _head_of_each_position(site, projection, weight)
            index = state_name(site.name, f"index{number}")
            self.model.register_buffer(index, heads, persistent=False)
            places[id(weight)] = (*places.get(id(weight), ()), (site.name, number))
        for name, tensor in list(self.model.named_parameters(remove_duplicate=False)):
            if id(tensor) in places:
                read_through_(*owner_of(self.model, name), _WeightMask(self, places[id(tensor)]))
        self.add_state_()
        vars(self.model)[_MASKS] = self
        return self

    def detach_(self) -> None:
        """Take the masks away from the model again."""
        read_as_they_are_(self.model)
        drop_state_(self.model)


class HeadMasks(SiteMasks):
    """Masks that are set: a buffer (heads,) for each site, all 1 at first."""

    def add_state_(self) -> None:
        """Add the buffers."""
        for site in self.sites.values():
            device = parameter(self.model, site.summed_by[0].weight).device
            ones = torch.ones(site.size, device=device)
            self.model.register_buffer(state_name(site.name), ones)

    def mask(self, site: str) -> torch.Tensor:
        """The buffer itself, to be written to."""
        return self.state(site)


def projections_to_mask(
    sites: Iterable[Site],
) -> Iterator[tuple[Site, int, Projection]]:
    """The output projections with their numbers; one that coupled sites share comes once."""
    seen: dict[str, list[Site]] = {}
    for site in sites:
        for number, projection in enumerate(site.summed_by):
            there = seen.setdefault(projection.weight, [])
            if not any(other.name in site.coupled for other in there):
                there.append(site)
                yield site, number, projection


def _head_of_each_position(
    site: Site, projection: Projection, weight: torch.Tensor
) -> torch.Tensor:
    """LongTensor that broadcasts against `weight`: head numbers, ``size`` for none."""
    heads = torch.full((weight.shape[projection.dim],), site.size)
    heads[projection.index.cpu()] = torch.arange(site.size)[:, None]
    shape = [1] * weight.ndim
    shape[projection.dim] = -1
    return heads.view(shape).to(weight.device)


def multiplied(
    weight: torch.Tensor, site: Site, projection: Projection, mask: torch.Tensor
) -> torch.Tensor:
    """The weight of an output projection, multiplied by the mask of its site."""
    heads = _head_of_each_position(site, projection, weight)
    return weight * _factor(mask, heads).to(weight.dtype)


def _factor(mask: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """The mask of each position's head; 1 for positions that belong to no head."""
    return torch.cat([mask, mask.new_ones(1)])[heads]


def drop_state_(model: nn.Module) -> None:
    """Take the buffers and parameters of masks off a model whose modules do not read them."""
    for name in [*model._buffers, *model._parameters]:
        if name.startswith(_STATE):
            delattr(model, name)
    vars(model).pop(_MASKS, None)


def masks_of(model: nn.Module) -> SiteMasks | None:
    """The masks that are attached to a model, if there are any."""
    return vars(model).get(_MASKS)


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the attribute."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    """A parameter itself, masked or not."""
    owner, attribute = owner_of(model, name)
    return cast(nn.Parameter, owner._parameters[attribute])


@dataclass(frozen=True, eq=False)
class _WeightMask:
    """The masks that a parameter is multiplied by: (site, number of its output projection)."""

    masks: SiteMasks
    places: tuple[tuple[str, int], ...]

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        for site, number in self.places:
            weight = weight * self.masks.factor(site, number).to(weight.dtype)
        return weight
