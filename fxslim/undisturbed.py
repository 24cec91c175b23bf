"""Undisturbed: a model is as it was after it has been called to be looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

__all__ = ["buffers_kept", "in_eval_mode", "seeded"]


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, batch norm by its running statistics; after that, each module as it was.

    Only the flags are set: a module's own `eval` may change its weights (those of LoRA merge).
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def buffers_kept(*models: nn.Module) -> Iterator[None]:
    """What calls write into buffers (counters, running statistics) is undone after them."""
    buffers = {id(buffer): buffer for model in models for buffer in model.buffers()}
    plain = [b for b in buffers.values() if not b.is_inference() and not is_lazy(b)]
    before = [(buffer, buffer._version, buffer.clone()) for buffer in plain]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, value in before:
                if buffer._version != version:
                    buffer.copy_(value)


@contextmanager
def seeded() -> Iterator[None]:
    """The same random numbers each time; after that, the generators as they were.

    So that models can be compared that draw noise in eval mode, too.
    """
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(0)
        yield
