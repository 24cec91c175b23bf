"""Costs: what each attention costs at each number of heads.  Plain data, JSON in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from fxslim.errors import CheckpointError
from fxslim.sites import Unit

__all__ = ["Costs", "Resource"]

Resource = Literal["parameters", "flops", "latency"]
"""What a model costs: elements, floating-point operations or seconds of a call."""


@dataclass(frozen=True)
class Costs:
    """What a model costs, by how many heads each attention keeps.

    Attributes:
        resource: "parameters", "flops" or "latency" (seconds).
        unit: what goes at a time; see `fxslim.plan`.
        rest: what everything but the attentions costs.
        sites: for each site, what it costs with 0, 1, ... and all of its heads.  Sites that must
            keep the same heads have one row, under the name that comes first.

    >>> Costs("flops", "group", rest=10.0, sites={"a": [0.0, 3.0, 6.0]}).total({"a": [1]})
    13.0
    """

    resource: Resource
    unit: Unit
    rest: float
    sites: dict[str, list[float]]

    def total(self, kept: Mapping[str, list[int]] | None = None) -> float:
        """What the model costs when each site keeps these heads; all of them if it is not named.

        Exact for parameters and FLOPs.  Where several attentions go whole, it may be less: what
        only they had in common goes, too.
        """
        kept = kept or {}
        rows = self.sites.items()
        return self.rest + sum(row[len(kept[n]) if n in kept else -1] for n, row in rows)

    def share(self, kept: Mapping[str, list[int]]) -> float:
        """The same as a share of what the whole model costs."""
        return self.total(kept) / self.total()

    def to_json(self) -> str:
        """The table as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Costs:
        """Read back what `to_json` wrote.

        Raises:
            CheckpointError: the text holds no costs.
        """
        try:
            data = json.loads(text)
            for key, known in (("resource", Resource), ("unit", Unit)):
                if data[key] not in get_args(known):
                    raise ValueError(f"unknown {key} {data[key]!r}")
            sites = {str(n): [float(cost) for cost in row] for n, row in data["sites"].items()}
            return cls(data["resource"], data["unit"], float(data["rest"]), sites)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"these are no costs ({type(error).__name__}: {error}); expected "
                '{"resource": "flops", "unit": "group", "rest": number, "sites": {site: [cost with '
                "0 heads, with 1, ...]}}"
            ) from error
