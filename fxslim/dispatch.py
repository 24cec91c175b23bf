"""Dispatch: which narrow program a call runs.

Dynamo runs one compiled graph with the weights of every layer that has the same code, and tells the
backend about the first of them only.  So each call looks at its weights: those of another layer may
keep other heads, and those that were written to since have to be narrowed anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from fxslim.decisions import Decisions, narrowed_by
from fxslim.dynamo import Traced
from fxslim.graph import attribute, set_attribute
from fxslim.lifting import lifted, without_data
from fxslim.passes.narrow import Selections, select
from fxslim.placed import Located

__all__ = ["Dispatch"]

Compile = Callable[[fx.GraphModule], Callable[..., Any]]
"""What becomes of a narrow program that takes its dense weights as inputs, or none."""


@dataclass
class Dispatch:
    """One compiled graph: called with its inputs, it runs what is left of it.

    Attributes:
        traced: the graph as a program.
        located: its attentions.
        decide: which heads they keep.
        compile: the inner backend.
    """

    traced: Traced
    located: Located
    decide: Decisions
    compile: Compile
    _chosen: dict[tuple[int, ...], _Narrowed] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        carrying = {
            weight
            for site in self.located.every_site
            for p in site.projections
            for weight in (p.weight, p.bias)
            if weight is not None
        }
        self._positions = [p for name, p in self.traced.weights.items() if name in carrying]

    def __call__(self, *inputs: Any) -> Any:
        """What Dynamo's graph returns, without the heads that go."""
        return self.narrowed(inputs)(inputs)

    def narrowed(self, inputs: Sequence[Any]) -> _Narrowed:
        """The narrow program for these weights, made where they are new."""
        weights = [inputs[position] for position in self._positions]
        key = tuple(map(id, weights))
        if key not in self._chosen:
            self._chosen[key] = self._narrow(inputs)
            for weight in weights:
                weakref.finalize(weight, self._chosen.pop, key, None)
        return self._chosen[key]

    def _narrow(self, inputs: Sequence[Any]) -> _Narrowed:
        """Decide which heads stay, and narrow the program."""
        weights = self.traced.tensors(inputs)
        slim, narrow = narrowed_by(self.decide, self.located, weights)
        for name, tensor in weights.items():
            set_attribute(self.traced.program, name, without_data(tensor))
        return _Narrowed(slim, self.traced.weights, narrow, self.compile)


class _Narrowed:
    """A narrow program in its two forms: weights narrowed beforehand, or in the graph."""

    def __init__(
        self,
        slim: fx.GraphModule,
        weights: Mapping[str, int],
        narrow: Mapping[str, Selections],
        compile: Compile,
    ) -> None:
        self.inside = lifted(slim, weights, narrow, inside=True)
        self.beforehand = lifted(slim, weights, narrow, inside=False)
        self.narrow = {
            name: (weights[name], chosen)
            for name, chosen in narrow.items()
            if any(n.target == name for n in self.beforehand.graph.find_nodes(op="get_attr"))
        }
        self.run = {form: compile(form) for form in (self.inside, self.beforehand)}
        self.versions: dict[str, tuple[int, StorageWeakRef]] = {}

    def __call__(self, inputs: Sequence[Any]) -> Any:
        dense = [inputs[position] for position, _ in self.narrow.values()]
        followed = torch.is_grad_enabled() and any(weight.requires_grad for weight in dense)
        if followed or any(weight.is_inference() for weight in dense):
            return self.run[self.inside](*inputs)
        self._refresh(inputs)
        return self.run[self.beforehand](*inputs)

    def _refresh(self, inputs: Sequence[Any]) -> None:
        """Narrow anew the weights that were written to since they were narrowed."""
        for name, (position, chosen) in self.narrow.items():
            weight = inputs[position]
            storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
            version = weight._version, storage
            if self.versions.get(name) != version:
                with torch.no_grad():
                    attribute(self.beforehand, name).copy_(select(weight, chosen))
                self.versions[name] = version
