"""How the accuracy benchmark judges: means and intervals, features, a linear probe."""

import math

import pytest
import torch
from _decoder import Decoder, next_token_loss
from _features import FeatureTests, TestSet, fit_probe, project_at_random
from _tasks import Metric
from torch import nn


def test_a_mean_and_its_change_item_by_item():
    dense = torch.tensor([1.0, 1.0, 0.0, 1.0])
    slim = torch.tensor([1.0, 0.0, 0.0, 1.0])
    found = Metric("accuracy").summary(slim, dense)
    assert (found["n"], found["value"], found["change"]) == (4, 0.5, -0.25)
    half = 1.96 * slim.std().item() / 2
    assert found["low"] == pytest.approx(0.5 - half)
    assert found["high"] == pytest.approx(0.5 + half)
    assert found["change_half"] == pytest.approx(1.96 * 0.5 / 2)


def test_perplexity_is_the_exponential_of_the_mean():
    found = Metric("perplexity", logarithmic=True).summary(torch.tensor([1.0, 3.0]), torch.ones(2))
    assert found["value"] == pytest.approx(math.exp(2))
    assert found["change"] == pytest.approx(1)


def test_next_token_loss_is_that_of_transformers():
    torch.manual_seed(0)
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 17, (2, 6))
    expected = model(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(next_token_loss(Decoder(model)(tokens)), expected)


def test_features_are_compared_and_classified():
    head = nn.Linear(2, 2, bias=False)
    head.weight.data = torch.eye(2)
    batches = [{"x": torch.tensor([[2.0, 1.0], [1.0, 2.0]])}, {"x": torch.tensor([[3.0, 0.0]])}]
    items = TestSet("sample", batches, torch.tensor([0, 0, 0]), head)
    tests = FeatureTests(nn.Identity(), lambda module, batch: module(batch["x"]), [items])
    assert [metric.name for metric in tests.metrics] == ["cosine, sample", "accuracy, sample"]
    same = tests(nn.Identity())
    torch.testing.assert_close(same["cosine, sample"], torch.ones(3))
    assert same["accuracy, sample"].tolist() == [1, 0, 1]
    swapped = nn.Linear(2, 2, bias=False)
    swapped.weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    other = tests(swapped)
    torch.testing.assert_close(other["cosine, sample"], torch.tensor([0.8, 0.8, 0.0]))
    assert other["accuracy, sample"].tolist() == [0, 1, 0]


def test_a_probe_separates_classes_whatever_the_scale():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 4, generator=generator)
    features[torch.arange(60), labels] += 8
    probe = fit_probe(features, labels)
    assert (probe(features).argmax(1) == labels).all()
    scaled = fit_probe(100 * features + 5, labels)
    torch.testing.assert_close(scaled(100 * features + 5), probe(features), atol=1e-2, rtol=1e-2)


def test_random_signs_repeat_by_seed():
    features = torch.arange(1.0, 13.0).reshape(3, 4)
    losses = [project_at_random(lambda output: output, seed)(features) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
