"""A picture of the figures: a panel for each task, a curve for each criterion."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from _record import Row

__all__ = ["Panel", "draw"]

_COLORS = ["C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9", "black"]
_MARKERS = "os^vD<>pX*h"


@dataclass(frozen=True)
class Panel:
    """What one panel shows.

    Attributes:
        task: Its name.
        metric: What is on the vertical axis.
        dense: The dense model's figures.
        rows: The rows of the task.
    """

    task: str
    metric: str
    dense: dict[str, Any]
    rows: Sequence[Row]

    def curve(self, criterion: str, repair: bool) -> dict[float, list[float]]:
        """For each share of heads removed the figures, one a draw; empty if there are none."""
        points: dict[float, list[float]] = {}
        for row in self.rows:
            if (row["criterion"], row["repair"]) == (criterion, repair):
                value = row["figures"][self.metric]["value"]
                points.setdefault(row["removed"], []).append(value)
        return {0.0: [self.dense["value"]]} | dict(sorted(points.items())) if points else {}


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Write a PNG: the figure against the share of heads removed, dashed without repair.

    Where there are several draws: their mean, and the area from the lowest to the highest.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["criterion"] for panel in panels for row in panel.rows))
    looks = {
        name: {"color": "grey" if name == "random" else color, "marker": marker}
        for name, color, marker in zip(names, cycle(_COLORS), cycle(_MARKERS), strict=False)
    }
    figure, all_axes = pyplot.subplots(
        1, len(panels), figsize=(5 * len(panels) + 2, 5), squeeze=False, layout="constrained"
    )
    lines = {}
    for axes, panel in zip(all_axes[0], panels, strict=True):
        for name in names:
            for repair, style in ((False, "--"), (True, "-")):
                if curve := panel.curve(name, repair):
                    means = [statistics.fmean(values) for values in curve.values()]
                    low, high = ([f(values) for values in curve.values()] for f in (min, max))
                    (line,) = axes.plot(list(curve), means, style, fillstyle="none", **looks[name])
                    axes.fill_between(list(curve), low, high, color=line.get_color(), alpha=0.15)
                    lines[name] = line
        axes.set(
            title=panel.task, xlabel="share of heads removed (solid: repaired)", ylabel=panel.metric
        )
        axes.set_yscale("log" if panel.dense["logarithmic"] else "linear")
        axes.grid(alpha=0.3)
    figure.legend(lines.values(), lines, loc="outside right center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
