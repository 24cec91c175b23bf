"""Parameters that their module reads through a function, under their own names.

`torch.nn.utils.parametrize` does the same, and renames the parameter in the state dict.  Here the
module's class becomes a subclass of the same name, with a property for the attribute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

__all__ = ["as_they_are", "read_as_they_are_", "read_through_"]

Reading = Callable[[torch.Tensor], torch.Tensor]

_READINGS = "_readings"


def read_through_(module: nn.Module, name: str, reading: Reading) -> None:
    """Have ``module.name`` give ``reading(parameter)``, in copies and pickles of it, too."""
    readings: dict[str, Reading] = vars(module).setdefault(_READINGS, {})
    readings[name] = reading
    module.__class__ = _reading_class(_plain_class(module), tuple(readings))


def read_as_they_are_(model: nn.Module) -> None:
    """Undo `read_through_` in all modules of a model."""
    for module in _reading_modules(model):
        del vars(module)[_READINGS]
        module.__class__ = _plain_class(module)


@contextmanager
def as_they_are(model: nn.Module) -> Iterator[None]:
    """All parameters of a model read as they are, meanwhile."""
    kinds = [(module, type(module)) for module in _reading_modules(model)]
    try:
        for module, _ in kinds:
            module.__class__ = _plain_class(module)
        yield
    finally:
        for module, kind in kinds:
            module.__class__ = kind


def _reading_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _READINGS in vars(module)]


def _plain_class(module: nn.Module) -> Any:
    """The class of a module that reads its parameters as they are."""
    kind = type(module)
    return vars(kind).get("_plain_class", kind)


@functools.cache
def _reading_class(plain: Any, names: tuple[str, ...]) -> Any:
    """`plain` with properties for some of its parameters."""
    members: dict[str, Any] = {name: property(_reader(name)) for name in names}
    members |= {"_plain_class": plain, "__reduce_ex__": _reduce, "__doc__": plain.__doc__}
    return type(plain.__name__, (plain,), members)


def _reader(name: str) -> Callable[[nn.Module], torch.Tensor]:
    def read(module: nn.Module) -> torch.Tensor:
        reading: Reading = module.__dict__[_READINGS][name]
        return reading(cast(torch.Tensor, module._parameters[name]))

    return read


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """How a module of a class that has no name to import is copied and pickled."""
    kind = _plain_class(module), tuple(vars(module)[_READINGS])
    return _made, kind, module.__getstate__()  # type: ignore[no-untyped-call]


def _made(plain: Any, names: tuple[str, ...]) -> Any:
    kind = _reading_class(plain, names)
    return kind.__new__(kind)
