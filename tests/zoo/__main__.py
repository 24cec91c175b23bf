"""Run the library over the zoo: ``python -m tests.zoo [names…]``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

from rich.console import Console

from tests.zoo.check import FAILURES, Result
from tests.zoo.entries import entry_names
from tests.zoo.markdown import page
from tests.zoo.runner import TIMEOUT, jobs_of, run
from tests.zoo.tables import report


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the entries named on the command line; 1 if one of them fails, else 0."""
    options = _parser().parse_args(arguments)
    names = _selected(options.names)
    if options.list:
        print("\n".join(names))
        return 0
    progress, results = Console(stderr=True), list[Result]()
    jobs = jobs_of(names, options.attn)
    for result in run(jobs, options.jobs, options.timeout):
        results.append(result)
        line = f"{len(results)}/{len(jobs)} {result.name} {result.attn}: {result.status}"
        progress.print(line, highlight=False, markup=False)
        if options.json:
            options.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    results.sort(key=lambda result: (names.index(result.name), result.attn))
    Console(width=100).print(report(results))
    if options.markdown:
        options.markdown.write_text(page(results))
    return int(any(result.status in FAILURES for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", help="entries or patterns ('t5*'); all without any")
    parser.add_argument("--attn", choices=("sdpa", "eager", "both"), default="both")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for one check")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a page of the docs")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    return parser


def _selected(patterns: Sequence[str]) -> list[str]:
    """The entries that match any of the patterns, in the zoo's order."""
    names = entry_names()
    unknown = [p for p in patterns if not any(fnmatch(name, p) for name in names)]
    if unknown:
        raise SystemExit(f"no entry matches {', '.join(unknown)}; --list prints the names")
    return [name for name in names if not patterns or any(fnmatch(name, p) for p in patterns)]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers end as well
    sys.exit(main())
