"""Parts: the programs that a captured model consists of; usually one, the model itself.

Where a model as a whole does not export, it is a copy of the user's own with programs in place of
the submodules that do (`fxslim.partial`).  Everything that works on programs works part by part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import fx, nn

from fxslim.program import Program

__all__ = ["each_part", "full_name", "meta_of", "parts_of", "path_of", "with_parts"]


def meta_of(module: nn.Module) -> dict[str, Any]:
    """What is known of a captured model: ``module.meta``; empty if it is none."""
    return cast(dict[str, Any], getattr(module, "__dict__", {}).get("meta", {}))


def path_of(part: nn.Module) -> str:
    """Where a part is in its model; empty if it is the model."""
    return cast(str, meta_of(part).get("path", ""))


def full_name(part: nn.Module, name: str) -> str:
    """What something in a part is called in the whole model."""
    return ".".join(filter(None, (path_of(part), name)))


def parts_of(module: nn.Module) -> dict[str, fx.GraphModule]:
    """The programs of a captured model by their paths; the empty path for one that is a program.

    Raises:
        TypeError: `module` is no captured model.
    """
    if isinstance(module, fx.GraphModule):
        return {path_of(module): module}
    if "parts" not in meta_of(module):
        raise TypeError(f"a program is what fxslim.capture returns, not {type(module).__name__}")
    return {p: cast(fx.GraphModule, module.get_submodule(p)) for p in meta_of(module)["parts"]}


def each_part(
    module: nn.Module, function: Callable[[str, fx.GraphModule], fx.GraphModule]
) -> nn.Module:
    """The model with what `function` makes of each part in place of it."""
    new = {path: function(path, part) for path, part in parts_of(module).items()}
    if isinstance(module, fx.GraphModule):
        return new[path_of(module)]
    made = with_parts(module, new)
    made.meta = {k: v for k, v in meta_of(module).items() if k != "fxslim"}  # type: ignore[assignment]
    return made


def with_parts(module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of `module` with other submodules at some paths, which shares all the rest."""
    made = _shallow(module)
    copied = {"": made}
    for path, part in parts.items():
        *above, name = path.split(".")
        owner, at = made, ""
        for step in above:
            at = f"{at}.{step}".lstrip(".")
            if at not in copied:
                copied[at] = _shallow(owner._modules[step])
                owner._modules[step] = copied[at]
            owner = copied[at]
        _stand_in(part, owner._modules[name])
        owner._modules[name] = part
    return made


def _shallow(module: nn.Module | None) -> nn.Module:
    """A copy of its own that shares all parameters, buffers and submodules."""
    assert module is not None
    made = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        setattr(made, name, copy.copy(getattr(module, name)))
    return made


def _stand_in(part: nn.Module, original: nn.Module | None) -> None:
    """Give a program the plain attributes (a config, say) that its model may read."""
    if not isinstance(part, Program) or original is None or isinstance(original, fx.GraphModule):
        return
    part.keep_attributes(
        {
            name: value
            for name, value in vars(original).items()
            if not name.startswith("_") and not hasattr(part, name)
        }
    )
