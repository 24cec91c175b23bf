"""A few entries in every run of the tests: each writes attention in a way of its own."""

import warnings

import pytest

from tests.zoo.check import check
from tests.zoo.handwritten import HANDWRITTEN

ARCHITECTURES = [("bert", "eager"), ("gpt2", "sdpa"), ("llama", "eager")]
WRITTEN_BY_HAND = [
    "alibi",
    "ddpm-attention",
    "head-sink",
    "mha-cross-batch-first",
    "nanogpt",
    "one-of-three",
    "returned-weights",
    "t5-bias",
]


@pytest.fixture(autouse=True)
def quiet():
    """What a model warns about while it is captured is not the point here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(("name", "attn"), ARCHITECTURES)
def test_half_of_the_heads_go_and_nothing_else_changes(name, attn):
    result = check(name, attn)
    assert result.status == "equal", result
    assert result.sites == result.prunable == result.cores > 0
    assert result.effect > 1e-3
    assert result.shapes[:2] == ["example", "batch"]


@pytest.mark.parametrize("name", WRITTEN_BY_HAND)
def test_every_way_of_writing_attention_is_understood_or_refused(name):
    entry = HANDWRITTEN[name]
    result = check(f"handwritten/{name}", "own")
    assert result.status == ("equal" if entry.prunable else "refused"), result
    assert result.sites == result.cores == entry.attentions
    assert result.prunable == entry.prunable
