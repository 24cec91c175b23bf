"""Repair a slim model: the front door of `fxslim.refit`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from fxslim.examples import Inputs, as_inputs, call_with
from fxslim.locate import locate_parts
from fxslim.matrices import Product, product_of
from fxslim.measure import count_parameters
from fxslim.padding import Attended
from fxslim.parts import each_part, meta_of, parts_of
from fxslim.placed import Located
from fxslim.program import copy_program
from fxslim.refit import refit
from fxslim.undisturbed import buffers_kept
from fxslim.walk import Call
from fxslim.weights import Weights

__all__ = ["repair"]


def repair(
    slim: nn.Module, dense: nn.Module, calibration: Iterable[Inputs], *, biases: bool = False
) -> nn.Module:
    """Return `slim` with its projections into the residual stream refitted to `dense`.

    Output projections, and the last projections of feed-forward blocks after the first attention
    that lost heads, are fitted by ridge regression to the values that the dense model has there;
    the ridge strength is chosen by held-out batches.  Padding, to which no query attends, does not
    count.  A projection without a bias keeps none, unless asked.

    Args:
        slim: what `fxslim.narrow` or `fxslim.compile` returned; not changed.
        dense: the captured program that `slim` was narrowed from; not changed.
        calibration: batches of inputs.  The activations of all of them are held at one place of the
            graph at a time, for both models.
        biases: give a bias to projections that have none, where their operator takes one (Linear
            and convolutions do): a parameter more, and no operator.

    Warns where there is nothing that can be refitted.

    Raises:
        ValueError: `slim` is not a narrowed form of `dense`, or there are no batches.
    """
    batches = list(calibration)
    if not batches:
        raise ValueError("repair needs calibration batches: calibration has none")
    located = locate_parts(dense)
    if parts_of(slim).keys() != located.keys():
        raise ValueError("slim was not narrowed from this dense model: their parts differ")
    done = []

    def one(path: str, part: fx.GraphModule) -> fx.GraphModule:
        made, _ = copy_program(part)
        whole = parts_of(dense)[path]
        products, ends = _products(located[path])
        ours, theirs = (_calls(m, path, batches) for m in (slim, dense))
        told = [*map(Attended(located[path]), theirs)]
        done.extend(refit(made, whole, products, ours, theirs, told, ends, biases=biases))
        made.recompile()
        return made

    with buffers_kept(slim, dense):
        repaired = each_part(slim, one)
    if not done and count_parameters(slim) < count_parameters(dense):
        warnings.warn(
            "fxslim.repair: nothing was refitted: behind the sites that were narrowed, no product "
            "is one of rows with a parameter of its own",
            stacklevel=2,
        )
    report = meta_of(slim).get("fxslim")
    if report is not None:
        meta_of(repaired)["fxslim"] = replace(report, refitted=tuple(done))
    return repaired


def _products(located: Located) -> tuple[list[Product], set[str]]:
    """Every product of an activation with a weight, and the names of the output projections'."""
    weights = Weights(located.axis_map)
    found = []
    for node, contractions in located.axis_map.contractions.items():
        for operand in weights.data_operands(contractions):
            product = product_of(weights, node, operand)
            if product is not None:
                found.append(product)
    return found, {node.name for a in located.placed for node, _ in a.ends}


def _calls(model: nn.Module, path: str, batches: list[Inputs]) -> list[Call]:
    """What the part at `path` is called with, batch by batch."""
    if isinstance(model, fx.GraphModule):
        return [as_inputs(batch) for batch in batches]
    calls: list[Call] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    hook = model.get_submodule(path).register_forward_pre_hook(record, with_kwargs=True)
    try:
        with torch.no_grad():
            for batch in batches:
                call_with(model, batch)
    finally:
        hook.remove()
    return calls
