"""What the command line and the demonstration share: load a local model, show progress, save."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import fx, nn
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from fxslim.errors import FxslimError
from fxslim.steps import Report

__all__ = ["Steps", "import_transformers", "load_model", "save"]


class Steps:
    """A progress bar over named steps.

    Args:
        console: Where to draw the bar.
        total: How many steps there will be.
    """

    def __init__(self, console: Console, total: int) -> None:
        text, bar = TextColumn("{task.description}"), BarColumn(bar_width=24)
        self._progress = Progress(
            bar, MofNCompleteColumn(), TimeElapsedColumn(), text, console=console
        )
        self._task = self._progress.add_task("", total=total)
        self._started = False

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self("done")
        self._progress.stop()

    def __call__(self, name: str) -> None:
        """The step before has ended; this one begins."""
        advance = 1 if self._started else 0
        self._progress.update(self._task, advance=advance, description=name)
        self._started = True


def import_transformers() -> Any:
    """The package `transformers`.

    Raises:
        FxslimError: It is not installed; says how to install it.
    """
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise FxslimError(
            "reading a model directory needs transformers, which is not installed: "
            "pip install 'fxslim[transformers]'"
        ) from error


def load_model(directory: Path) -> nn.Module:
    """The model in a directory that transformers wrote, in eval mode; nothing is downloaded.

    Args:
        directory: Holds ``config.json`` and the weights. Code in it is not run.

    Raises:
        FxslimError: It is no such directory, or transformers cannot load it; quotes why.
    """
    if not (directory / "config.json").is_file():
        raise FxslimError(
            f"{directory} is no model directory: it has no config.json "
            "(model.save_pretrained writes one)"
        )
    transformers = import_transformers()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        model_class = _model_class(transformers, config)
        model: nn.Module = model_class.from_pretrained(
            directory, config=config, local_files_only=True
        )
    except FxslimError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise FxslimError(
            f"transformers could not load {directory}: {type(error).__name__}: {reason}"
        ) from error
    return model.eval()


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that the config names, or the bare model of its type where it names none."""
    name = next(iter(config.architectures or ()), "AutoModel")
    found = getattr(transformers, name, None)
    if found is None:
        raise FxslimError(
            f"config.json names the architecture {name!r}, which transformers "
            f"{transformers.__version__} does not have; code in a model directory is not run"
        )
    return found


def save(slim: nn.Module, folder: Path) -> list[Path]:
    """Write ``slim.pt2`` (an exported program) and ``plan.json``.

    Args:
        slim: What `fxslim.compile` returned.
        folder: Where to; made if it is not there.

    Returns:
        The files written.

    Raises:
        FxslimError: It is no program: the model as a whole does not export.
    """
    if not isinstance(slim, fx.GraphModule):
        raise FxslimError(
            f"{type(slim).__name__} does not export as a whole, so there is no program to save; "
            "fxslim.compile prunes the submodules that do, and torch.save keeps the result"
        )
    folder.mkdir(parents=True, exist_ok=True)
    program, plan = folder / "slim.pt2", folder / "plan.json"
    args, kwargs = slim.meta["example_inputs"]
    shapes = _symbolic(slim, args, kwargs)
    torch.export.save(torch.export.export(slim, args, kwargs, dynamic_shapes=shapes), program)
    plan.write_text(Report.of(slim).plan.to_json() + "\n")
    return [program, plan]


def _symbolic(slim: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Which sizes of the inputs are symbolic: those that are in the program."""
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    places = [node for node in slim.graph.nodes if node.op == "placeholder"]
    for place, leaf in zip(places, pytree.tree_leaves((args, kwargs)), strict=True):
        if isinstance(leaf, torch.Tensor):
            sizes = enumerate(place.meta["val"].shape)
            shapes[leaf] = {d: Dim.AUTO for d, n in sizes if isinstance(n, torch.SymInt)}
    return shapes.dynamic_shapes(slim, args, kwargs)  # type: ignore[no-untyped-call]
