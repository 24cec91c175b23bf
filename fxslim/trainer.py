"""Pruning in a transformers `Trainer`.  Import it where transformers is: nothing here does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback  # noqa: TID253  not imported with fxslim

from fxslim.examples import Inputs
from fxslim.inc import Pruning, hook_optimizer_, prepare_pruning

__all__ = ["PruningCallback"]


class PruningCallback(TrainerCallback):
    """Prune attention heads while a `Trainer` trains: ``Trainer(..., callbacks=[...])``.

    The model is prepared when the trainer is made, so that a checkpoint of the run finds its masks
    when it is loaded; the optimizer's steps call the hooks once training begins.

    Args:
        configs, example_inputs: as for `fxslim.prepare_pruning`.

    Attributes:
        pruning: what `fxslim.prepare_pruning` returned, once there is a trainer.
    """

    pruning: Pruning

    def __init__(
        self,
        configs: Mapping[str, Any] | Iterable[Mapping[str, Any]],
        example_inputs: Inputs | None = None,
    ) -> None:
        self.configs, self.example_inputs = configs, example_inputs
        self._hooks: list[RemovableHandle] = []

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any
    ) -> None:
        """Prepare the model."""
        if model is None:
            raise ValueError("the Trainer has no model yet (model_init): pass model= instead")
        self.pruning = prepare_pruning(model, self.configs, example_inputs=self.example_inputs)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Optimizer | None = None, **_: Any
    ) -> None:
        """Hook the optimizer, which the trainer has made by now."""
        if optimizer is None:
            raise ValueError("the Trainer has no optimizer when training begins")
        self._hooks = hook_optimizer_(optimizer, self.pruning)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the hooks off: the trainer may train once more, with the same optimizer."""
        for hook in self._hooks:
            hook.remove()
