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
from fxslim.sites import Site
from fxslim.training_masks import SiteMasks, parameter, state_name
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
    """Give a model a learned gate for every head that can go.

    Train it with ``loss + strength * gates.penalty()``; the gates are parameters of the model
    (``head_masks/<site>``), and learn with a larger rate than its weights do.  `fxslim.model_slim`
    removes the heads whose gates have closed, and multiplies the other gates into the weights.

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
    gates = L0Gates(
        model,
        sites,
        example_inputs,
        open_probability=open_probability,
        temperature=temperature,
    )
    gates.attach_()
    model.register_forward_pre_hook(gates.draw)
    return gates


class L0Gates(SiteMasks):
    """The gates of a model in training: one for the heads that go together.

    In training mode each forward of the model draws new noise; in eval mode there is none.  Sites
    that are coupled share one parameter (units,).

    Attributes:
        temperature: of the sigmoid.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        example_inputs: Inputs | None = None,
        *,
        open_probability: float,
        temperature: float,
    ) -> None:
        super().__init__(model, sites, example_inputs)
        self.temperature = temperature
        self._start = math.log(open_probability / (1 - open_probability)) + self._shift

    def add_state_(self) -> None:
        """Add a parameter, and noise, for each site that shares no earlier one's."""
        for site in self.sites.values():
            weight = parameter(self.model, site.summed_by[0].weight)
            units = torch.zeros(site.size, dtype=torch.long, device=weight.device)
            for number, heads in enumerate(site.unit):
                units[list(heads)] = number
            self._register(site, "unit", units)
            if self._shared(site.name) == site.name:
                logits = weight.new_full((len(site.unit),), self._start)
                self.model.register_parameter(state_name(site.name), nn.Parameter(logits))
                self._register(site, "noise", torch.full_like(logits, 0.5, dtype=torch.float32))

    def _register(self, site: Site, kind: str, value: torch.Tensor) -> None:
        self.model.register_buffer(state_name(site.name, kind), value, persistent=False)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the gates, which are among the model's, for an optimizer."""
        return list({id(p): p for p in map(self._logits, self.sites)}.values())

    def draw(self, model: nn.Module, inputs: Any) -> None:
        """Draw noise, uniform in (0, 1), if in training mode; a forward hook of the model."""
        if model.training:
            for site in self.sites:
                if self._shared(site) == site:
                    self.state(site, "noise").uniform_(1e-6, 1 - 1e-6)

    def mask(self, site: str) -> torch.Tensor:
        """The gates (heads,) of a site, in [0, 1]."""
        logits: torch.Tensor = self._logits(site)
        if self.model.training:
            noise = self.state(self._shared(site), "noise")
            logits = (logits + noise.logit()) / self.temperature
        return _stretched(logits)[self.state(site, "unit")]

    def penalty(self) -> torch.Tensor:
        """The expected number of heads whose gates are not 0: the L0 penalty, a scalar."""
        expected = [
            (self._logits(site) - self._shift).sigmoid()[self.state(site, "unit")]
            for site in self.sites
        ]
        return torch.cat(expected).sum()

    def plan(self) -> PruningPlan:
        """The plan that keeps the heads whose gates are open in eval mode."""
        gates = {
            site: _stretched(self._logits(site).detach())[self.state(site, "unit")]
            for site in self.sites
        }
        kept = {site: values.nonzero().flatten().tolist() for site, values in gates.items()}
        return PruningPlan.of(kept, list(self.sites.values()))

    def _logits(self, site: str) -> nn.Parameter:
        """The parameter (units,) of a site's gates."""
        return cast(nn.Parameter, self.state(self._shared(site)))

    def _shared(self, site: str) -> str:
        """The site whose parameter a site uses."""
        together = {site, *self.sites[site].coupled}
        return next(name for name in self.sites if name in together)

    @property
    def _shift(self) -> float:
        """What a gate's parameter is above the logit of its probability to be open."""
        return self.temperature * math.log(-_LOW / _HIGH)


def _stretched(logits: torch.Tensor) -> torch.Tensor:
    """Gates in [0, 1]."""
    return (logits.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)
