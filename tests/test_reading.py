"""Reading parameters through a function: the attribute changes, the parameter does not."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fxslim.reading import as_they_are, read_as_they_are_, read_through_


class Twice:
    """A reading that can be pickled."""

    def __call__(self, weight):
        return 2 * weight


def doubled():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2))
    read_through_(model[0], "weight", Twice())
    return model


def test_the_attribute_is_read_through_the_function():
    model = doubled()
    (parameter, *_) = model.parameters()
    x = torch.randn(4, 3)
    assert torch.equal(model[0].weight, 2 * parameter)
    assert torch.equal(model[0](x), x @ (2 * parameter).T)
    assert isinstance(model[0], nn.Linear)
    assert repr(model[0]) == repr(nn.Linear(3, 3, bias=False))


def test_the_parameter_keeps_name_and_values_and_can_be_replaced():
    model = doubled()
    assert list(model.state_dict()) == ["0.weight", "1.weight", "1.bias"]
    model[0].weight = nn.Parameter(torch.ones(3, 3))
    assert torch.equal(model.state_dict()["0.weight"], torch.ones(3, 3))
    assert torch.equal(model[0].weight, torch.full((3, 3), 2.0))
    model[0].weight.sum().backward()
    assert torch.equal(model[0]._parameters["weight"].grad, torch.full((3, 3), 2.0))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_read_alike_and_on_their_own(copied):
    model = doubled()
    other = copied(model)
    assert torch.equal(other[0].weight, model[0].weight)
    read_as_they_are_(other)
    assert torch.equal(2 * other[0].weight, model[0].weight)


def test_several_attributes_of_a_module():
    linear = nn.Linear(3, 3)
    read_through_(linear, "weight", Twice())
    read_through_(linear, "bias", Twice())
    x = torch.randn(4, 3)
    expected = 2 * (x @ linear._parameters["weight"].T + linear._parameters["bias"])
    torch.testing.assert_close(linear(x), expected)


def test_as_they_are_meanwhile_and_for_good():
    model = doubled()
    weight = model[0]._parameters["weight"]
    with as_they_are(model):
        assert model[0].weight is weight
    assert torch.equal(model[0].weight, 2 * weight)
    with pytest.raises(RuntimeError, match="shapes"), as_they_are(model):
        model(torch.randn(4, 5))
    assert torch.equal(model[0].weight, 2 * weight)
    read_as_they_are_(model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight is weight
