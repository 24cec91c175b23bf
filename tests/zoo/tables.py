"""The results of a run for people: a table, what was refused and why, and the totals."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tests.zoo.check import FAILURES, Result

__all__ = ["kinds_of_reasons", "report", "result_table"]

_WIDTH = 100
_STYLES = {"equal": "green", "refused": "yellow", "skipped": "dim", "capture": "yellow"}


def report(results: Sequence[Result]) -> RenderableType:
    """Everything about a run, at most 100 columns wide."""
    parts: list[RenderableType] = [result_table(results)]
    failures = [result for result in results if result.status in (*FAILURES, "capture")]
    if failures:
        parts += [_failure_table(failures)]
    parts += [_counts("refused sites: why", _summed(map(kinds_of_reasons, results)))]
    parts += [_counts("operators without a rule, sites", _summed(r.operators for r in results))]
    parts += [Text(_totals(results))]
    return Group(*parts)


def result_table(results: Sequence[Result]) -> Table:
    """One row a result."""
    table = _table("entry", "attn", "cores", "sites", "prunable", "difference", "status", "s")
    for column in table.columns[2:6]:
        column.justify = "right"
    for result in results:
        compared = result.status in ("equal", "wrong")
        missing = result.sites < result.cores and result.status != "skipped"
        style = "red" if result.status in FAILURES else _STYLES.get(result.status)
        table.add_row(
            escape(result.name),
            result.attn,
            f"{result.cores}",
            f"[red]{result.sites}[/]" if missing else f"{result.sites}",
            f"{result.prunable}",
            f"{result.difference.relative:.0e}" if compared else "",
            Text(result.status, style or ""),
            f"{result.seconds:.1f}",
        )
    return table


def _table(first: str, *headings: str) -> Table:
    table = Table(width=_WIDTH, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, overflow="fold", ratio=1)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _failure_table(failures: Iterable[Result]) -> Table:
    """What happened, once for all the entries that it happened to."""
    entries: dict[str, list[str]] = {}
    for result in failures:
        lines = [result.status, *result.detail.strip().splitlines()[:4]]
        if result.status == "wrong":
            lines[1:1] = [f"{result.difference} over {', '.join(result.shapes)}"]
        entries.setdefault("\n".join(lines), []).append(f"{result.name} {result.attn}")
    table = Table("what happened", "entries", width=_WIDTH, box=SIMPLE_HEAD, pad_edge=False)
    for what, names in sorted(entries.items(), key=lambda item: -len(item[1])):
        table.add_row(escape(what), escape(f"{len(names)}: {', '.join(names)}"))
    return table


def _summed(counts: Iterable[dict[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total


_PLACE = re.compile(r" \([^()]* in [^()]*\)|(?<=\w)_\d+\b")


def kinds_of_reasons(result: Result) -> dict[str, int]:
    """The reasons without the places in the graph that they name."""
    kinds: Counter[str] = Counter()
    for reason, count in result.reasons.items():
        kinds[_PLACE.sub("", reason)] += count
    return kinds


def _counts(title: str, counts: Counter[str]) -> RenderableType:
    """The names that count most, first."""
    table = Table(title, "", width=_WIDTH, box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].ratio = 1
    for name, count in counts.most_common(40):
        table.add_row(escape(name), f"{count}")
    return table if counts else Text("")


def _totals(results: Sequence[Result]) -> str:
    """One line a total.

    >>> print(_totals([Result("bert", "sdpa", "equal", cores=2, sites=2, prunable=2)]))
    1 checks: 1 equal
    2 cores, 2 sites, 2 prunable, 0 s
    """
    statuses = Counter(result.status for result in results)
    by_status = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
    cores, sites, prunable = (
        sum(getattr(result, name) for result in results) for name in ("cores", "sites", "prunable")
    )
    seconds = sum(result.seconds for result in results)
    lines = [f"{len(results)} checks: {by_status}"]
    lines += [f"{cores} cores, {sites} sites, {prunable} prunable, {seconds:.0f} s"]
    blind = [r.name for r in results if r.status == "equal" and r.effect < 1e-5]
    if blind:
        lines += [f"the removed heads made no difference in: {', '.join(blind)}"]
    return "\n".join(lines)
