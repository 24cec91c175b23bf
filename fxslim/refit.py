"""Repair: refit what is left to what the dense model computes, layer by layer, in closed form.

After heads are gone, every projection back into the residual stream is fitted anew by ridge
regression, in the order of the graph: from the slim model's own activations, in which all earlier
layers are pruned and refitted already, to the dense model's values.  The new weights replace the
old ones; no operator is added.  Refitting after structured pruning is how OSSCAR (Meng et al. 2024)
and SlimGPT (Ling et al. 2024) repair language models; aiming at the residual stream lets a layer
make up for what earlier ones got wrong.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from fxslim.entries import bias_of, matrix_of, readers
from fxslim.graph import arguments, attribute, set_argument, set_attribute, shape
from fxslim.least_squares import Moments, fit
from fxslim.matrices import Product, as_matrix
from fxslim.padding import Told
from fxslim.passes.base import infer_shapes
from fxslim.progress import tracked
from fxslim.uses import Use, use_of
from fxslim.walk import Call, Walk

__all__ = ["Refitted", "refit"]

_JUDGE = 5
"""One batch in so many judges the ridge strength; of fewer batches, the last rows of each."""


@dataclass(frozen=True)
class Refitted:
    """One weight that was refitted.

    Attributes:
        weight: its name in the state dict.
        strength: the ridge strength, chosen by held-out error; infinite if the weight stayed.
        before: mean squared error of what it adds to, held out, with the weight as it was.
        after: the same with the weight that was fitted.
    """

    weight: str
    strength: float
    before: float
    after: float


def refit(
    slim: fx.GraphModule,
    dense: fx.GraphModule,
    products: Sequence[Product],
    slim_calls: Sequence[Call],
    dense_calls: Sequence[Call],
    told: Sequence[Told],
    always: Collection[str] = (),
    *,
    biases: bool = False,
) -> list[Refitted]:
    """Refit the weights of `products` in the order of the graph; `slim` gets new parameters.

    Args:
        slim: the narrowed program.
        dense: the program that it was narrowed from: its nodes have the same names.
        products: what to refit, as nodes of `dense`; those that `slim` has no more are passed over.
        slim_calls: positional and keyword arguments of every batch.
        dense_calls: the same for the dense program, where they differ in parts of a model.
        told: of every batch, which positions are attended to and count.
        always: names of products to refit to their dense values where they are not added to a
            residual stream; others are passed over then.
        biases: give a bias to what is refitted and has none, where the operator takes one.
    """
    if biases:
        _add_biases(slim, _layers(slim, dense, products, always))
    layers = _layers(slim, dense, products, always)
    uses = sorted((use for layer in layers for use in layer.uses), key=lambda use: use.place)
    layer_of = {use.node: layer for layer in layers for use in layer.uses}
    ours = Walk(slim, slim_calls)
    theirs = Walk(dense, dense_calls, [n for use in uses for n in (use.dense, use.total)])
    done: dict[str, Refitted] = {}
    with torch.no_grad():
        for use in tracked(uses, "repairing"):
            layer = layer_of[use.node]
            ours.advance(use.node)
            theirs.advance(use.total.next)
            layer.count(use, ours, theirs, told)
            theirs.release(use.dense, use.total)
            result = layer.replace(slim)
            if result is not None:
                done[layer.weight] = result
            if use is layer.uses[-1]:
                layer.counted = None  # one layer's moments at a time
            if len(layer.uses) > 1:  # what its earlier uses gave has changed
                ours.restart()
    return list(done.values())


@dataclass(frozen=True)
class _Counted:
    """A matrix (features, outputs) and its bias as they are, and the rows to fit and to judge."""

    weight: torch.Tensor
    bias: torch.Tensor
    train: Moments
    judge: Moments


@dataclass
class _Layer:
    """A weight with all its uses, and what was counted of them.

    Attributes:
        weight, bias: names of the parameters; no bias where there is none, or others use it.
        positions: LongTensor (features, outputs): where each entry of the matrix is in the weight.
        refused: whether a use turned out not to be the product of rows with that matrix.
    """

    weight: str
    bias: str | None
    positions: torch.Tensor
    uses: list[Use] = field(default_factory=list)
    refused: bool = False
    counted: _Counted | None = None

    def count(self, use: Use, ours: Walk, theirs: Walk, told: Sequence[Told]) -> None:
        """Count the rows of every batch: the slim program's features, the dense one's targets."""
        features = ours.values(use.node.all_input_nodes[use.product.operand])
        products, totals = theirs.values(use.dense), theirs.values(use.total)
        if not features or not self._begin(use, ours, features[0]):
            self.refused = True
        if self.refused or self.counted is None:
            return
        whole = len(features) >= _JUDGE
        for batch, (value, product, total) in enumerate(
            zip(features, products, totals, strict=True)
        ):
            wanted = use.wanted(ours, batch, product, total)
            x = as_matrix(value, use.product.features, use.product.rows)
            y = as_matrix(wanted, use.product.outputs)
            seen = told[batch].operand(use.product, value)
            if seen is not None:
                counted = as_matrix(seen, use.product.features, use.product.rows)[:, 0]
                x, y = x[counted], y[counted]
            judging = len(x) if whole and batch % _JUDGE == _JUDGE - 1 else 0
            cut = len(x) - (judging if whole else len(x) // _JUDGE)
            self.counted.train.add(x[:cut], y[:cut])
            self.counted.judge.add(x[cut:], y[cut:])

    def _begin(self, use: Use, ours: Walk, value: torch.Tensor) -> bool:
        """Whether the node computes rows times this matrix, tried on the first batch."""
        x = as_matrix(value, use.product.features, use.product.rows)
        y = as_matrix(ours.result(use.node, 0), use.product.outputs)
        weight = attribute(ours.program, self.weight).detach().flatten()[self.positions]
        if x.shape[1] != len(weight) or y.shape[1] != weight.shape[1] or not len(x):
            return False
        rest = y.double() - x.double() @ weight.double()
        scale = y.double().abs().max().clamp_min(1e-6)
        if (rest - rest[0]).abs().max() > _rounding(y.dtype) * scale:
            return False
        if self.counted is None:
            features, outputs = weight.shape
            train, judge = (Moments(features, outputs, x.device) for _ in range(2))
            self.counted = _Counted(weight, rest.mean(0), train, judge)
        return True

    def replace(self, program: fx.GraphModule) -> Refitted | None:
        """Fit to all that was counted, and put new parameters in place of the old ones."""
        if self.refused or self.counted is None:
            return None
        sums = self.counted
        intercept = self.bias is not None
        result = fit(sums.train, sums.judge, sums.weight, sums.bias, intercept=intercept)
        if math.isfinite(result.strength):
            _put(program, self.weight, self.positions, result.weight)
            if self.bias is not None:
                every = torch.arange(len(result.bias), device=result.bias.device)
                _put(program, self.bias, every, result.bias)
        return Refitted(self.weight, result.strength, result.before, result.after)


def _put(program: fx.GraphModule, name: str, positions: torch.Tensor, values: torch.Tensor) -> None:
    """Replace a parameter by a new one that has `values` at `positions` of its elements."""
    old = attribute(program, name)
    new = old.detach().clone().contiguous()
    new.view(-1)[positions.flatten()] = values.flatten().to(new.dtype)
    set_attribute(program, name, nn.Parameter(new, requires_grad=old.requires_grad))


def _rounding(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 5e-2)


def _layers(
    slim: fx.GraphModule,
    dense: fx.GraphModule,
    products: Sequence[Product],
    always: Collection[str],
) -> list[_Layer]:
    """The weights behind `products`, from the first that differs between the programs on."""
    ours = {node.name: node for node in slim.graph.nodes}
    theirs = {node.name: node for node in dense.graph.nodes}
    walk = Walk(slim, ())
    reached = readers(walk)
    layers: dict[int, _Layer] = {}
    for product in products[_first_change(ours, theirs, products) :]:
        node = ours.get(product.node)
        found = None if node is None else matrix_of(walk, product, node)
        if node is None or found is None:
            continue
        use = use_of(walk, product, node, theirs)
        if use.residual is None and product.node not in always:
            continue
        if shape(ours[use.total.name].meta["val"]) != shape(use.total.meta["val"]):
            continue  # it is narrow itself, as what is added to queries is: no residual stream
        tensor = attribute(slim, found[0])
        if id(tensor) not in layers:
            layers[id(tensor)] = _Layer(found[0], bias_of(walk, product, node), found[1])
        layers[id(tensor)].uses.append(use)
    for number, layer in list(layers.items()):
        nodes = {use.node for use in layer.uses}
        if reached[number] != nodes:
            del layers[number]
        elif layer.bias and not reached[id(attribute(slim, layer.bias))] <= nodes:
            layer.bias = None
    return list(layers.values())


def _add_biases(program: fx.GraphModule, layers: Sequence[_Layer]) -> None:
    """Give a bias of zeros to each layer that has none and whose operators take one."""
    for layer in layers:
        nodes = [use.node for use in layer.uses]
        (_, outputs), weight = layer.positions.shape, attribute(program, layer.weight)
        takes = all(_takes_bias(node, weight.dtype) for node in nodes)
        if layer.bias is not None or not takes:
            continue
        name = f"{layer.weight.removesuffix('.weight')}.bias"
        path, _, own = name.rpartition(".")
        bias = nn.Parameter(weight.new_zeros(outputs), requires_grad=weight.requires_grad)
        program.get_submodule(path).register_parameter(own, bias)
        with program.graph.inserting_before(nodes[0]):
            added = program.graph.get_attr(name)
        for node in nodes:
            set_argument(node, "bias", added)
    infer_shapes(program)


def _takes_bias(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether an operator has a place for a bias of this type, and nothing there."""
    given = arguments(node)
    return "bias" in given and given["bias"] is None and node.meta["val"].dtype == dtype


def _first_change(
    ours: Mapping[str, fx.Node], theirs: Mapping[str, fx.Node], products: Sequence[Product]
) -> int:
    """The number of the first product that is not the same in both programs."""
    for number, product in enumerate(products):
        one, other = ours.get(product.node), theirs[product.node]
        if one is None or _width(one, product) != _width(other, product):
            return number
    return len(products)


def _width(node: fx.Node, product: Product) -> list[int]:
    """The sizes of the dimensions that are summed over."""
    shape = node.all_input_nodes[product.operand].meta["val"].shape
    return [int(shape[d]) for d in product.features]
