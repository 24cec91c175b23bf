"""Head masks on the model that is trained, where it reads the weights of its output projections.

A mask m multiplies the context c of each head.  Where the context meets the output projection W,
W (m ∘ c) = (W ∘ m) c: masking the columns of W is the same, wherever and however the model uses W.
So the attribute that holds W gives W ∘ m when it is read, while the parameter keeps its name, its
values and its place in the state dict.  No forward hook is involved: whatever calls, compiles,
recomputes or wraps the model reads the attribute.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from fxslim.masks import mask_name
from fxslim.sites import AttentionSite, Projection

__all__ = [
    "HeadMasks",
    "SiteMasks",
    "attach_",
    "detach_",
    "masked_weights",
    "masks_of",
    "owner_of",
    "parameter",
    "slashed",
    "unmasked",
]

_MASKS, _OF_WEIGHTS = "head_masks", "_weight_masks"


def slashed(site: str) -> str:
    """A site's name as part of a buffer's name."""
    return mask_name(site).removeprefix("head_masks.")


class SiteMasks(nn.Module):
    """The masks of a model in training, ``model.head_masks``.

    Attributes:
        sites: the attentions that are masked, by name.
    """

    def __init__(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        super().__init__()
        self.sites = {site.name: site for site in sites}
        for site in sites:
            for number, projection in enumerate(site.output):
                weight = parameter(model, projection.weight)
                heads = _head_of_each_position(site, projection, weight)
                self.register_buffer(_index(site.name, number), heads, persistent=False)

    def mask(self, site: str) -> torch.Tensor:
        """The mask (heads,) of a site."""
        raise NotImplementedError

    def factor(self, site: str, number: int) -> torch.Tensor:
        """What the weight of a site's output projection is multiplied by, broadcast against it."""
        mask = self.mask(site)
        mask = torch.cat([mask, mask.new_ones(1)])  # for positions that belong to no head
        return mask[getattr(self, _index(site, number))]


class HeadMasks(SiteMasks):
    """Masks that are set: a buffer (heads,) of ones for each site, under its name."""

    def __init__(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        super().__init__(model, sites)
        for site in sites:
            device = parameter(model, site.output[0].weight).device
            ones = torch.ones(site.num_heads, device=device)
            self.register_buffer(slashed(site.name), ones)

    def mask(self, site: str) -> torch.Tensor:
        """The mask (heads,) of a site."""
        return cast(torch.Tensor, getattr(self, slashed(site)))


def _index(site: str, number: int) -> str:
    """The name of the buffer that says which head each position of a weight belongs to."""
    return f"{slashed(site)}/index{number}"


def _head_of_each_position(
    site: AttentionSite, projection: Projection, weight: torch.Tensor
) -> torch.Tensor:
    """LongTensor that broadcasts against `weight`: head numbers, ``num_heads`` for none."""
    heads = torch.full((weight.shape[projection.dim],), site.num_heads)
    heads[projection.index.cpu()] = torch.arange(site.num_heads)[:, None]
    shape = [1] * weight.ndim
    shape[projection.dim] = -1
    return heads.view(shape).to(weight.device)


@dataclass(frozen=True, eq=False)
class _WeightMask:
    """The masks that a parameter is multiplied by: (site, number of its output projection)."""

    masks: SiteMasks
    places: tuple[tuple[str, int], ...]

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        for site, number in self.places:
            weight = weight * self.masks.factor(site, number).to(weight.dtype)
        return weight


def attach_(model: nn.Module, masks: SiteMasks) -> None:
    """Let the model read its output projections through `masks`, which become ``head_masks``.

    Raises:
        ValueError: the model has masks already, or an attribute of that name.
    """
    if hasattr(model, _MASKS):
        raise ValueError(
            f"{type(model).__name__} has an attribute 'head_masks' already: a model is prepared "
            "for pruning once; use the pruner that it has, or a fresh copy of the model"
        )
    places = {
        id(parameter(model, name)): _WeightMask(masks, where)
        for name, where in _places(masks.sites.values()).items()
    }
    for name, tensor in list(model.named_parameters(remove_duplicate=False)):
        if id(tensor) in places:
            owner, attribute = owner_of(model, name)
            _weight_masks(owner)[attribute] = places[id(tensor)]
            owner.__class__ = _masked_class(_plain_class(owner), tuple(_weight_masks(owner)))
    model.add_module(_MASKS, masks)


def _places(sites: Iterable[AttentionSite]) -> dict[str, tuple[tuple[str, int], ...]]:
    """For each weight by name, the masks that hold for it; coupled sites have the same."""
    found: dict[str, tuple[tuple[str, int], ...]] = {}
    for site in sites:
        for number, projection in enumerate(site.output):
            there = found.setdefault(projection.weight, ())
            if not any(other in site.coupled for other, _ in there):
                found[projection.weight] = (*there, (site.name, number))
    return found


def detach_(model: nn.Module) -> None:
    """Take the masks away again."""
    for module in model.modules():
        if _OF_WEIGHTS in vars(module):
            del vars(module)[_OF_WEIGHTS]
            module.__class__ = _plain_class(module)
    delattr(model, _MASKS)


def masks_of(model: nn.Module) -> SiteMasks | None:
    """The masks that `attach_` gave a model, if it did."""
    masks = getattr(model, _MASKS, None)
    return masks if isinstance(masks, SiteMasks) else None


@contextmanager
def unmasked(model: nn.Module) -> Iterator[None]:
    """The model as it is without its masks, meanwhile."""
    masked = [(m, type(m)) for m in model.modules() if _OF_WEIGHTS in vars(m)]
    try:
        for module, _ in masked:
            module.__class__ = _plain_class(module)
        yield
    finally:
        for module, kind in masked:
            module.__class__ = kind


@torch.no_grad()
def masked_weights(model: nn.Module, masks: SiteMasks) -> dict[str, torch.Tensor]:
    """The weights of the output projections by name, multiplied by their masks."""
    return {
        name: _WeightMask(masks, where)(parameter(model, name)).detach()
        for name, where in _places(masks.sites.values()).items()
    }


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the attribute."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    """A parameter itself, masked or not."""
    owner, attribute = owner_of(model, name)
    return cast(nn.Parameter, owner._parameters[attribute])


def _weight_masks(owner: nn.Module) -> dict[str, _WeightMask]:
    masks: dict[str, _WeightMask] = vars(owner).setdefault(_OF_WEIGHTS, {})
    return masks


def _plain_class(module: nn.Module) -> Any:
    """The class of a module without masked attributes."""
    kind = type(module)
    return vars(kind).get("_plain_class", kind)


@functools.cache
def _masked_class(plain: Any, attributes: tuple[str, ...]) -> type[nn.Module]:
    """`plain` with properties that read its parameters through their masks."""
    members: Mapping[str, Any] = {name: property(_reader(name)) for name in attributes}
    methods = {"_plain_class": plain, "__reduce_ex__": _reduce, "__doc__": plain.__doc__}
    return type(plain.__name__, (plain,), {**members, **methods})


def _reader(name: str) -> Any:
    def read(module: nn.Module) -> torch.Tensor:
        mask: _WeightMask = module.__dict__[_OF_WEIGHTS][name]
        return mask(cast(torch.Tensor, module._parameters[name]))

    return read


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """How a module of a class that has no name to import is copied and pickled."""
    return _made, (_plain_class(module), tuple(_weight_masks(module))), module.__getstate__()  # type: ignore[no-untyped-call]


def _made(plain: type[nn.Module], attributes: tuple[str, ...]) -> nn.Module:
    kind = _masked_class(plain, attributes)
    return kind.__new__(kind)
