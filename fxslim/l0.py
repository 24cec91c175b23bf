"""Learned masks: hard-concrete gates, whose expected number is a penalty on the loss.

Louizos, Welling and Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization"; for
attention heads, Voita et al. 2019.  A gate is the sigmoid of a parameter and of noise, stretched to
[-0.1, 1.1] and clipped to [0, 1], so that it is exactly 0 or 1 much of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from fxslim.examples import Inputs
from fxslim.plan import PruningPlan
from fxslim.sites import AttentionSite
from fxslim.training_masks import SiteMasks, attach_, parameter, slashed
from fxslim.training_sites import bare, training_sites

__all__ = ["L0Gates", "insert_l0_gates_"]

_LOW, _HIGH = -0.1, 1.1


def insert_l0_gates_(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    open_probability: float = 0.99,
    temperature: float = 2 / 3,
) -> L0Gates:
    """Give a model a learned gate for every head that can go, as ``model.head_masks``.

    Train it with ``loss + strength * gates.penalty()``; the gates are parameters of the model, and
    learn with a larger rate than its weights do.  `fxslim.model_slim` removes the heads whose
    gates have closed, and multiplies the other gates into the weights.

    Args:
        model: changed; in `DistributedDataParallel` or compiled, what is inside.
        example_inputs: as for `fxslim.capture`.
        open_probability: that a gate is open when training begins, in (0, 1).
        temperature: of the gates, above 0; the lower, the nearer they are to 0 and 1.

    Raises:
        ValueError: a number out of range, or the model has masks already.
        CaptureError: PyTorch cannot export the model.
        UnsupportedSite: no attention can be pruned.
    """
    if not 0 < open_probability < 1:
        raise ValueError(f"open_probability must be in (0, 1), not {open_probability!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature!r}")
    model = bare(model)
    sites = [site for site in training_sites(model, example_inputs) if site.prunable]
    gates = L0Gates(model, sites, open_probability=open_probability, temperature=temperature)
    attach_(model, gates)
    model.register_forward_pre_hook(gates.draw)
    return gates


class L0Gates(SiteMasks):
    """The gates of a model in training: one for the heads that go together.

    In training mode each forward of the model draws new noise; in eval mode there is none.  The
    parameters (units,) have the names of the sites; sites that are coupled share the first one's.

    Attributes:
        temperature: of the sigmoid.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[AttentionSite],
        *,
        open_probability: float,
        temperature: float,
    ) -> None:
        super().__init__(model, sites)
        self.temperature = temperature
        start = math.log(open_probability / (1 - open_probability)) + self._shift
        for site in sites:
            device = parameter(model, site.output[0].weight).device
            units = torch.zeros(site.num_heads, dtype=torch.long, device=device)
            for number, heads in enumerate(site.unit):
                units[list(heads)] = number
            self.register_buffer(f"{slashed(site.name)}/unit", units, persistent=False)
            if self._shared(site) == site.name:
                logits = torch.full((len(site.unit),), start, device=device)
                self.register_parameter(slashed(site.name), nn.Parameter(logits))
                noise = torch.full_like(logits, 0.5)
                self.register_buffer(f"{slashed(site.name)}/noise", noise, persistent=False)

    def draw(self, model: nn.Module, inputs: Any) -> None:
        """Draw noise, uniform in (0, 1), if in training mode; a forward hook of the model."""
        if self.training:
            for name, noise in self.named_buffers():
                if name.endswith("/noise"):
                    noise.uniform_(1e-6, 1 - 1e-6)

    def mask(self, site: str) -> torch.Tensor:
        """The gates (heads,) of a site, in [0, 1]."""
        logits = self._logits(site)
        if self.training:
            noise = self._buffer(self._shared(self.sites[site]), "noise")
            logits = (logits + noise.logit()) / self.temperature
        return _stretched(logits)[self._buffer(site, "unit")]

    def penalty(self) -> torch.Tensor:
        """The expected number of heads whose gates are not 0: the L0 penalty, a scalar."""
        expected = [
            (self._logits(site) - self._shift).sigmoid()[self._buffer(site, "unit")]
            for site in self.sites
        ]
        return torch.cat(expected).sum()

    def plan(self) -> PruningPlan:
        """The plan that keeps the heads whose gates are open in eval mode."""
        gates = {
            site: _stretched(self._logits(site).detach())[self._buffer(site, "unit")]
            for site in self.sites
        }
        kept = {site: values.nonzero().flatten().tolist() for site, values in gates.items()}
        return PruningPlan.of(kept, list(self.sites.values()))

    def _logits(self, site: str) -> torch.Tensor:
        """The parameter (units,) of a site's gates."""
        name = slashed(self._shared(self.sites[site]))
        return cast(torch.Tensor, getattr(self, name))

    def _buffer(self, site: str, kind: str) -> torch.Tensor:
        return cast(torch.Tensor, getattr(self, f"{slashed(site)}/{kind}"))

    def _shared(self, site: AttentionSite) -> str:
        """The site whose parameter a site uses."""
        together = {site.name, *site.coupled}
        return next(name for name in self.sites if name in together)

    @property
    def _shift(self) -> float:
        """What a gate's parameter is above the logit of its probability to be open."""
        return self.temperature * math.log(-_LOW / _HIGH)


def _stretched(logits: torch.Tensor) -> torch.Tensor:
    """Gates in [0, 1]."""
    return (logits.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)
