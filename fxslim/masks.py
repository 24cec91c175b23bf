"""Head masks of a masked program: where they are, and what they are set to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fxslim.graph import attribute
from fxslim.parts import parts_of

__all__ = ["head_masks", "mask_name", "restored", "set_masks"]


def mask_name(site: str) -> str:
    """The name of a site's mask in the masked program: ``head_masks.<site>``, dots as slashes."""
    return f"head_masks.{site.replace('.', '/')}"


def head_masks(masked: nn.Module, sites: Sequence[str]) -> dict[str, torch.Tensor]:
    """The mask (heads,) of each site that has one."""
    found = {}
    for part in parts_of(masked).values():
        names = {*part.get_submodule("head_masks")._parameters}
        names |= {*part.get_submodule("head_masks")._buffers}
        for site in sites:
            if mask_name(site).removeprefix("head_masks.") in names:
                found[site] = attribute(part, mask_name(site))
    return found


@contextmanager
def restored(masks: Iterable[torch.Tensor]) -> Iterator[None]:
    """Masks that may be written to meanwhile, and are as they were after that."""
    before = [(mask, mask.detach().clone()) for mask in masks]
    try:
        yield
    finally:
        for mask, value in before:
            mask.detach().copy_(value)


def set_masks(masked: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Set head masks to 1 for the heads that stay and to 0 for the others of their sites."""
    for site, mask in head_masks(masked, list(kept)).items():
        with torch.no_grad():
            mask.zero_()
            mask[list(kept[site])] = 1
