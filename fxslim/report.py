"""What was found and done, for people: tables for a terminal and a picture of the head scores.

Everything here takes plain results (sites, plan, scores, modules) and changes none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import JustifyMethod

    from fxslim.measure import Totals
    from fxslim.plan import PruningPlan
    from fxslim.sites import AttentionSite

__all__ = ["human", "save_heatmap", "site_table", "totals_table"]

_WIDTH = 80
"""Columns of every table: an ordinary terminal, a log, a README."""


def human(number: float) -> str:
    """A count in three digits and a unit.

    >>> human(22_713_216), human(847), human(1.5e9), human(999_900)
    ('22.7 M', '847', '1.5 G', '1 M')
    """
    for unit, size in ((" T", 1e12), (" G", 1e9), (" M", 1e6), (" K", 1e3)):
        if abs(number) >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def site_table(
    sites: Sequence[AttentionSite],
    plan: PruningPlan | None = None,
    scores: Mapping[str, Tensor] | None = None,
    *,
    dense: nn.Module | None = None,
    slim: nn.Module | None = None,
) -> Table:
    """One row a site; below the table, the sites that cannot be pruned and why.

    Args:
        sites: What `fxslim.find_attention` returned.
        plan: Which heads stay; without it, the heads as they are.
        scores: A score for every head of a site; adds a column with their range.
        dense: The module the sites were found in; adds a column with the sizes of the parameters
            that carry a site's heads (one that several sites share counts at each).
        slim: The narrowed module; puts the parameters after beside those before.

    Returns:
        A rich table of 80 columns.
    """
    modules = [module for module in (dense, slim) if module is not None]
    sizes = [_parameter_sizes(module) for module in modules]
    table = _table("site", kind="left", heads="right")
    table.columns[1].max_width = len("cross")
    if sizes:
        table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("scores" if scores else "prunable", justify="right", no_wrap=True)
    for site in sites:
        row = [escape(site.name), _kind(site), _heads(site, plan)]
        if sizes:
            row.append(" → ".join(human(_site_parameters(site, size)) for size in sizes))
        row.append(_verdict(site, scores))
        table.add_row(*row, style=None if site.prunable else "dim")
    table.caption = _refusals(sites) or None
    return table


def _table(first: str, **columns: JustifyMethod) -> Table:
    """A table of 80 columns whose first column takes what the others leave."""
    table = Table(width=_WIDTH, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    table.caption_justify, table.caption_style = "left", ""
    table.add_column(first, overflow="fold", ratio=1)
    for heading, justify in columns.items():
        table.add_column(heading, justify=justify, no_wrap=True)
    return table


def _kind(site: AttentionSite) -> str:
    return f"{site.kind}\ncross" if site.is_cross else site.kind


def _heads(site: AttentionSite, plan: PruningPlan | None) -> str:
    before = f"{site.num_heads}"
    if site.num_kv_heads != site.num_heads:
        before += f" ({site.num_kv_heads} kv)"
    if plan is None or site.name not in plan.kept:
        return before
    return f"{before} → {len(plan.kept[site.name])}"


def _verdict(site: AttentionSite, scores: Mapping[str, Tensor] | None) -> str:
    if not site.prunable:
        return "refused"
    if not scores:
        return "yes"
    if site.name not in scores:
        return "-"
    score = scores[site.name]
    return f"{score.min().item():.2g}…{score.max().item():.2g}"


def _refusals(sites: Sequence[AttentionSite]) -> str:
    """Every reason once, after the names of the sites that share it."""
    names: dict[str, list[str]] = {}
    for site in sites:
        if not site.prunable:
            names.setdefault(f"{site.reason}", []).append(site.name)
    return escape("\n".join(f"refused: {', '.join(names[why])}: {why}" for why in names))


def _parameter_sizes(module: nn.Module) -> dict[str, int]:
    """Elements of every parameter, under each of its names: a tied one has several."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter.numel() for name, parameter in named}


def _site_parameters(site: AttentionSite, sizes: Mapping[str, int]) -> int:
    projections = site.projections
    names = {name for p in projections for name in (p.weight, p.bias) if name is not None}
    return sum(sizes.get(name, 0) for name in names)


def totals_table(result: Totals) -> Table:
    """Parameters, operations and time of a whole model, dense beside slim, in 80 columns."""
    rows: tuple[tuple[str, tuple[float, float], Callable[[float], str]], ...] = (
        ("parameters", result.parameters, human),
        ("FLOPs, one forward pass", result.flops, human),
        ("latency, median, in turn", result.seconds, lambda seconds: f"{1e3 * seconds:.1f} ms"),
    )
    table = _table("whole model", dense="right", slim="right", ratio="right")
    for name, (dense, slim), show in rows:
        table.add_row(name, show(dense), show(slim), f"{slim / dense:.2f}" if dense else "-")
    return table


def save_heatmap(path: Path, scores: Mapping[str, Tensor], plan: PruningPlan | None = None) -> Path:
    """Draw the scores as a PNG, a row a site and a column a head; removed heads are crossed out.

    Args:
        path: Where the picture goes; the folders above it are made.
        scores: A score for every head of a site.
        plan: Which heads stay; without it, none is crossed out.

    Returns:
        The path that was given.

    Raises:
        ValueError: There is no score to draw.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not any(score.numel() for score in scores.values()):
        raise ValueError("save_heatmap: there are no scores to draw; score at least one site")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_NO_MATPLOTLIB, name=error.name) from error
    columns = max(score.numel() for score in scores.values())
    figure = Figure(figsize=(max(6.0, 3.0 + 0.4 * columns), 1.6 + 0.35 * len(scores)))
    _draw(figure.add_subplot(), _grid(scores, columns), list(scores), plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    return path


_NO_MATPLOTLIB = "a picture of the head scores needs matplotlib: pip install 'fxslim[plot]'"


def _grid(scores: Mapping[str, Tensor], columns: int) -> Tensor:
    """All scores as one matrix; NaN where a site has fewer heads than the widest."""
    grid = torch.full((len(scores), columns), torch.nan, dtype=torch.float64)
    for row, score in zip(grid, scores.values(), strict=True):
        row[: score.numel()] = score.detach().double().cpu()
    return grid


def _draw(axes: Axes, grid: Tensor, names: Sequence[str], plan: PruningPlan | None) -> None:
    from matplotlib.patheffects import withStroke

    finite = grid[grid.isfinite()]
    wide = bool(finite.min() > 0 and finite.max() > 10 * finite.min())
    image = axes.imshow(grid.numpy(), aspect="auto", norm="log" if wide else None)
    axes.figure.colorbar(image, ax=axes, label="score", pad=0.02)
    axes.set_yticks(range(len(names)), labels=names, fontsize=8)
    axes.set_xticks(range(0, grid.shape[1], 1 + grid.shape[1] // 24))
    axes.set_ylabel("site")
    axes.set_xlabel("head (×: removed)" if plan else "head")
    axes.set_title("Score of every attention head")
    cells = _removed(grid, names, plan)
    outline = [withStroke(linewidth=3, foreground="black")]
    columns, rows = [column for _, column in cells], [row for row, _ in cells]
    axes.scatter(columns, rows, marker="x", color="white", path_effects=outline)


def _removed(grid: Tensor, names: Sequence[str], plan: PruningPlan | None) -> list[tuple[int, int]]:
    """Row and column of every scored head that the plan does not keep."""
    kept = plan.kept if plan else {}
    return [
        (row, head)
        for row, name in enumerate(names)
        if name in kept
        for head in grid[row].isfinite().nonzero().flatten().tolist()
        if head not in kept[name]
    ]
