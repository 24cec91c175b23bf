"""Criteria: each against its definition, computed another way."""

import functools

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import fxslim
from fxslim.criteria import CRITERIA, Random, Sensitivity
from tests.models import (
    HEAD_DIM,
    HEADS,
    Attention,
    Residual,
    captured,
    example,
    grouped_core,
    merge,
    softmax_core,
    split,
)


def masked_of(model, inputs):
    return fxslim.insert_head_masks(fxslim.capture(model, inputs))


@functools.cache
def small():
    """A model and its masked program."""
    torch.manual_seed(0)
    model = Attention()
    return model, masked_of(model, example())


def blocks(weight, dim):
    """The slices of a weight, one a head."""
    return weight.detach().chunk(weight.shape[dim] // HEAD_DIM, dim)


def test_magnitude_is_the_mean_absolute_weight():
    model, masked = small()
    expected = sum(
        torch.stack([part.abs().mean() for part in blocks(linear.weight, dim)])
        for linear, dim in [(model.q, 0), (model.k, 0), (model.v, 0), (model.o, 1)]
    )
    torch.testing.assert_close(fxslim.score(masked, "magnitude")["attention"], expected)


def relative(norms):
    return norms / norms.mean()


def products(model, owner=range(HEADS)):
    """The smaller of two relative norms a head, with the KV head that each has."""
    query, output = blocks(model.q.weight, 0), blocks(model.o.weight, 1)
    key, value = blocks(model.k.weight, 0), blocks(model.v.weight, 0)
    context = torch.stack([(o @ value[kv]).norm() for o, kv in zip(output, owner, strict=True)])
    scores = torch.stack([(q.mT @ key[kv]).norm() for q, kv in zip(query, owner, strict=True)])
    return torch.minimum(relative(context), relative(scores))


def test_weight_product_is_the_smaller_of_output_times_value_and_query_times_key():
    model, masked = small()
    scores = fxslim.score(masked, "weight_product")["attention"]
    torch.testing.assert_close(scores, products(model))


@pytest.mark.parametrize("weight", ["q", "k", "v", "o"])
def test_a_head_without_weights_has_no_weight_product(weight):
    model = Attention()
    with torch.no_grad():
        blocks(model.get_submodule(weight).weight, int(weight == "o"))[2].zero_()
    scores = fxslim.score(masked_of(model, example()), "weight_product")["attention"]
    assert scores[2] == 0
    assert scores.count_nonzero() == HEADS - 1


def test_weight_product_pairs_a_query_head_with_its_kv_head():
    model = Attention(kv_heads=2, core=grouped_core)
    scores = fxslim.score(masked_of(model, example()), "weight_product")
    torch.testing.assert_close(scores["attention"], products(model, (0, 0, 1, 1)))


def test_weight_product_follows_tiled_kv_heads():
    def tiled_core(q, k, v):
        return softmax_core(q, *(x.repeat(1, 2, 1, 1) for x in (k, v)))

    model = Attention(kv_heads=2, core=tiled_core)
    scores = fxslim.score(masked_of(model, example()), "weight_product")
    torch.testing.assert_close(scores["attention"], products(model, (0, 1, 0, 1)))


def test_random_is_the_same_for_the_same_seed():
    _, masked = small()
    first, again = (fxslim.score(masked, Random(seed=3)) for _ in range(2))
    assert torch.equal(first["attention"], again["attention"])
    assert not torch.equal(first["attention"], fxslim.score(masked, Random())["attention"])


@pytest.mark.parametrize(("name", "power"), [("taylor", 1), ("fisher", 2)])
def test_sensitivity_is_the_mean_power_of_the_masks_gradient(name, power):
    model, masked = small()
    batches = [example(), example(2, 7), example(1, 3)]
    expected = torch.zeros(HEADS)
    for x in batches:
        mask = torch.ones(HEADS, requires_grad=True)
        q, k, v = (split(linear(x)) for linear in (model.q, model.k, model.v))
        context = (q @ k.mT / HEAD_DIM**0.5).softmax(-1) @ v * mask.view(-1, 1, 1)
        loss = model.o(merge(context)).square().mean()
        expected += torch.autograd.grad(loss, mask)[0].abs() ** power / len(batches)
    scores = fxslim.score(masked, name, batches, loss_fn=lambda y: y.square().mean())
    torch.testing.assert_close(scores["attention"], expected)
    assert all(parameter.grad is None for parameter in masked.parameters())


class WithLoss(nn.Module):
    """A model whose output has a loss, as transformers' have."""

    def __init__(self):
        super().__init__()
        self.model = Attention()

    def forward(self, x, y):
        out = self.model(x)
        return SequenceClassifierOutput(loss=(out - y).square().mean(), logits=out)


def test_the_loss_is_the_outputs_own_where_it_has_one():
    batch = {"x": example(), "y": example()}
    masked = masked_of(WithLoss(), batch)
    own = fxslim.score(masked, "taylor", [batch])["model"]
    same = fxslim.score(masked, "taylor", [batch], loss_fn=lambda output: output.loss * 2)["model"]
    assert (own > 0).all()
    torch.testing.assert_close(same, own * 2)


def test_any_object_that_scores_is_a_criterion():
    class Last:
        def score(self, masked, sites, calibration, loss_fn):
            return {site.name: torch.arange(site.num_heads) for site in sites}

    _, masked = small()
    assert fxslim.score(masked, Last())["attention"].tolist() == [0, 1, 2, 3]


def test_only_prunable_sites_are_scored():
    scores = fxslim.score(fxslim.insert_head_masks(captured("one-of-three")[-1]), "random")
    assert list(scores) == ["layers.1.attention"]


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_scores_are_one_a_head_whatever_the_arrangement(name):
    model = Residual(a=Attention(), b=Attention(kv_heads=1, core=softmax_core))
    scores = fxslim.score(masked_of(model, example()), name, [example()], loss_fn=torch.sum)
    assert {key: tuple(value.shape) for key, value in scores.items()} == {
        "layers.a": (4,),
        "layers.b": (4,),
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("best",), "unknown criterion 'best'; known: activation, compensated_fisher, fisher, "),
        (("taylor",), "this criterion needs calibration batches: pass calibration="),
        (("taylor", []), "calibration has no batches"),
        (("taylor", [example()]), "the model's output has no .loss; pass loss_fn=lambda output"),
    ],
)
def test_what_is_missing_is_named(arguments, said):
    _, masked = small()
    with pytest.raises(ValueError, match=f"^{said}"):
        fxslim.score(masked, *arguments)


@pytest.mark.parametrize("criterion", ["weight_product", "magnitude", Sensitivity()])
def test_weights_without_values_cannot_be_scored(criterion):
    with torch.device("meta"):
        model, x = Attention(), example()
    masked = masked_of(model, x)
    assert set(fxslim.score(masked, "random")) == {"attention"}
    with pytest.raises(ValueError, match=r"^heads cannot be scored: '.*' is on the meta device"):
        fxslim.score(masked, criterion, [x], loss_fn=torch.sum)
