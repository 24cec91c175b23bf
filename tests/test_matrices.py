"""Products with a weight are rows times a matrix, however they are written."""

import pytest
import torch
from torch import nn

import fxslim
from fxslim.locate import locate
from fxslim.matrices import as_matrix, product_of
from fxslim.walk import Walk
from fxslim.weights import Weights
from tests.models import HEAD_DIM, HEADS, WIDTH, Attention, captured, example, split


class Written(Attention):
    """An attention whose output projection is written some other way."""

    def __init__(self, project, shape):
        super().__init__()
        self.weight, self.project = nn.Parameter(torch.randn(shape)), project
        self.o = None

    def forward(self, x):
        q, k, v = (split(linear(x)) for linear in (self.q, self.k, self.v))
        return self.project(self.core(q, k, v), self.weight)


def flat(context):
    return context.transpose(1, 2).flatten(2)


ALL = HEADS * HEAD_DIM
WRITTEN = {
    "linear": (lambda c, w: nn.functional.linear(flat(c), w), (WIDTH, ALL)),
    "matmul": (lambda c, w: flat(c) @ w, (ALL, WIDTH)),
    "transposed": (lambda c, w: flat(c) @ w.T, (WIDTH, ALL)),
    "einsum": (
        lambda c, w: torch.einsum("bhld,hdo->blo", c, w),
        (HEADS, HEAD_DIM, WIDTH),
    ),
    "einsum, other order": (
        lambda c, w: torch.einsum("bhld,ohd->lbo", c, w),
        (WIDTH, HEADS, HEAD_DIM),
    ),
    "addmm": (
        lambda c, w: torch.addmm(torch.ones(WIDTH), flat(c).flatten(0, 1), w),
        (ALL, WIDTH),
    ),
    "convolution": (
        lambda c, w: nn.functional.conv1d(flat(c).mT, w),
        (WIDTH, ALL, 1),
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_rows_times_the_matrix_is_the_product(name):
    torch.manual_seed(0)
    x = example()
    program = fxslim.capture(Written(*WRITTEN[name]), x)
    located = locate(program)
    ((node, contraction),) = located.attentions[0].ends
    product = product_of(Weights(located.axis_map), node, contraction.operand)
    assert product is not None
    walk = Walk(program, [((x,), {})])
    walk.advance(node)
    inputs = node.all_input_nodes
    rows = as_matrix(walk.value(inputs[product.operand], 0), product.features, product.rows)
    weight = as_matrix(walk.constant(inputs[product.weight]), product.weight_features).mT
    result = as_matrix(walk.result(node, 0), product.outputs)
    assert weight.shape == (ALL, WIDTH)
    torch.testing.assert_close(rows @ weight + (name == "addmm"), result)


def test_a_product_of_two_activations_is_none():
    program = captured("one-of-three")[-1]
    located = locate(program)
    weights = Weights(located.axis_map)
    products = {
        product.node
        for node, contractions in located.axis_map.contractions.items()
        for operand in weights.data_operands(contractions)
        if (product := product_of(weights, node, operand)) is not None
    }
    cores = {name for site in located.sites for name in site.cores}
    assert products
    assert not products & cores
