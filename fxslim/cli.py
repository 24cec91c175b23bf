"""The command line: ``fxslim demo``, ``fxslim inspect DIR``, ``fxslim prune DIR --out DIR2``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.console import Console

import fxslim
from fxslim import demo as demonstration
from fxslim.costs import Resource
from fxslim.errors import FxslimError, check_choice
from fxslim.measure import totals
from fxslim.report import site_table, totals_table
from fxslim.sites import Site
from fxslim.targets import Scope
from fxslim.workflow import Steps, load_model, save

__all__ = ["app"]

app = typer.Typer(
    help="Find every attention of a transformer model and cut out the heads it does not need.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", help="A model directory that transformers wrote.")
]
Sparsity = Annotated[float, typer.Option(help="Share of the heads to remove, in [0, 1).")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/demo"),
    sparsity: Sparsity = 0.5,
) -> None:
    """Prune a real sentence encoder and show what it costs and saves."""
    with _one_message():
        _check(sparsity)
        demonstration.run(out, sparsity)


@app.command()
def inspect(directory: Directory) -> None:
    """List every attention of a model: its kind, its heads, and why it cannot be pruned if so."""
    with _one_message():
        console = Console()
        with console.status("loading and capturing the model"):
            model = load_model(directory)
            program = fxslim.capture(model)
            sites = fxslim.find_attention(program)
        console.print(site_table(sites, dense=model))
        prunable = [site for site in sites if site.prunable]
        heads = sum(site.num_heads for site in prunable)
        console.print(f"{len(sites)} sites, {len(prunable)} prunable with {heads} heads")
        for note in program.meta["capture"]:
            console.print(f"capture: {note}", markup=False)


@app.command()
def prune(
    directory: Directory,
    out: Annotated[Path, typer.Option(help="Folder for slim.pt2 and plan.json.")],
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the heads to remove, in [0, 1); 0.5 by default.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="In place of it: share of the cost that may remain.")
    ] = None,
    resource: Annotated[
        str, typer.Option(help="What a budget is of: parameters, flops or latency.")
    ] = "flops",
    ffn_sparsity: Annotated[
        float, typer.Option(help="Share of the channels of feed-forward blocks to remove as well.")
    ] = 0.0,
    scope: Annotated[str, typer.Option(help="global, local or uniform.")] = "global",
    criterion: Annotated[
        str, typer.Option(help="How heads are scored; one that needs no data.")
    ] = "weight_product",
) -> None:
    """Remove heads of a model and save the slim program with its plan."""
    with _one_message():
        _check(sparsity, criterion, budget, resource, scope, ffn_sparsity)
        console = Console()
        with Steps(console, total=5) as step:
            step("load")
            model = load_model(directory)
            step("capture")
            program = fxslim.capture(model)
            step("score, narrow, verify")
            slim = fxslim.compile(
                program,
                sparsity,
                criterion=criterion,
                budget=budget,
                costs=None if budget is None else cast(Resource, resource),
                scope=cast(Scope, scope),
                ffn_sparsity=ffn_sparsity,
            )
            step("measure")
            args, kwargs = program.meta["example_inputs"]
            cost = totals(program, slim, args or kwargs)
            step("save")
            files = save(slim, out)
        done = fxslim.Report.of(slim)
        sites: list[Site] = [*done.sites, *done.feed_forwards]
        console.print(site_table(sites, done.plan, done.scores, dense=model, slim=slim))
        console.print("", totals_table(cost), "", sep="\n")
        console.print(f"slim against masked: largest difference {done.max_difference:.1e}")
        console.print(f"wrote {', '.join(map(str, files))}", soft_wrap=True)


def _check(
    sparsity: float | None,
    criterion: str = "random",
    budget: float | None = None,
    resource: str = "flops",
    scope: str = "global",
    ffn_sparsity: float = 0.0,
) -> None:
    """Refuse bad options before any work."""
    if not 0 <= ffn_sparsity < 1:
        raise ValueError(f"--ffn-sparsity must be in [0, 1), not {ffn_sparsity}")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"--sparsity must be in [0, 1), not {sparsity}")
    if budget is not None and not 0 < budget <= 1:
        raise ValueError(f"--budget must be in (0, 1], not {budget}")
    if sparsity is not None and budget is not None:
        raise ValueError("give --sparsity or --budget, not both")
    check_choice("--resource", resource, get_args(Resource))
    check_choice("--scope", scope, get_args(Scope))
    if criterion not in fxslim.CRITERIA:
        known = ", ".join(fxslim.CRITERIA)
        raise ValueError(f"--criterion {criterion!r} is unknown; known: {known}")


@contextmanager
def _one_message() -> Iterator[None]:
    """Print warnings and expected errors as plain messages; after an error, exit with code 1."""
    console = Console(stderr=True, highlight=False)
    try:
        with warnings.catch_warnings():
            # torch.export copies pytree specs with copyreg, which trips over its own deprecation.
            warnings.filterwarnings("ignore", ".isinstance.treespec", FutureWarning)
            warnings.showwarning = lambda message, *_, **__: console.print(
                f"warning: {message}", style="yellow", markup=False, soft_wrap=True
            )
            yield
    except (FxslimError, ImportError, OSError, TypeError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
