"""Linear modules of a slim program, and torchao's quantization of them."""

import copy
import io

import pytest
import torch
from torch import nn

import fxslim
from tests.models import Attention, Residual, example, grouped_core
from tests.zoo import build


def slim_model():
    model = Residual(a=Attention(), b=Attention(kv_heads=2, core=grouped_core)).eval()
    return fxslim.compile(model, 0.5, example())


def test_every_linear_operator_is_a_module_of_the_same_names():
    slim, x = slim_model(), example(2, 7)
    linear = fxslim.linear_modules(slim)
    assert sum(isinstance(module, nn.Linear) for module in linear.modules()) == 8
    assert linear.state_dict().keys() == slim.state_dict().keys()
    assert linear.get_parameter("layers.a.q.weight") is slim.get_parameter("layers.a.q.weight")
    assert not any(isinstance(module, nn.Linear) for module in slim.modules())
    torch.testing.assert_close(linear(x), slim(x))


class Tied(nn.Module):
    """An output layer with the embedding's weight, and one without a bias that is called twice."""

    def __init__(self):
        super().__init__()
        self.embedding, self.attention = nn.Embedding(11, 6), Attention(bias=False)
        self.twice = nn.Linear(6, 6, bias=False)

    def forward(self, ids):
        x = self.twice(self.twice(self.attention(self.embedding(ids))))
        return nn.functional.linear(x, self.embedding.weight)


def test_a_weight_that_something_else_reads_stays_as_it_is():
    ids = torch.arange(10).reshape(2, 5)
    slim = fxslim.compile(Tied().eval(), 0.5, ids)
    linear = fxslim.linear_modules(slim)
    names = {name for name, module in linear.named_modules() if isinstance(module, nn.Linear)}
    assert names == {"twice", *(f"attention.{own}" for own in "qkvo")}
    torch.testing.assert_close(linear(ids), slim(ids))


def size(model):
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    return len(stream.getvalue())


CONFIGS = [
    "Int8DynamicActivationInt8WeightConfig",
    pytest.param("Int8WeightOnlyConfig", marks=pytest.mark.zoo),  # docs/compile.md has it, too
]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # torchao's imports
@pytest.mark.parametrize("config", CONFIGS)
def test_torchao_quantizes_a_slim_model(config):
    from torchao import quantization

    model, inputs = build("bert", "sdpa")
    slim = fxslim.compile(model, 0.5, inputs)
    quantized = copy.deepcopy(fxslim.linear_modules(slim))
    quantization.quantize_(quantized, getattr(quantization, config)())
    expected, got = slim(**inputs)["logits"], quantized(**inputs)["logits"]
    assert 0 < (got - expected).norm() / expected.norm() < 0.03
    assert size(quantized) < 0.6 * size(slim)
