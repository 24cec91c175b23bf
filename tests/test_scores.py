"""Scores: plain dicts of tensors that may carry a matrix, and survive being written down."""

import copy
import pickle
import re

import pytest
import torch

from fxslim.errors import CheckpointError
from fxslim.scores import Scores


def random_scores(dtype=torch.float32):
    factors = torch.randn(5, 3, dtype=dtype)
    return Scores({"a": torch.rand(2), "b.c@2": torch.rand(3)}, factors @ factors.mT)


def test_scores_are_a_dict():
    scores = random_scores()
    assert list(scores) == ["a", "b.c@2"]
    assert Scores(scores) == dict(scores)
    assert Scores(scores).matrix is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_json_keeps_every_number(dtype):
    scores = random_scores(dtype)
    read = Scores.from_json(scores.to_json())
    assert list(read) == list(scores)
    assert all(torch.equal(read[name], values.double()) for name, values in scores.items())
    assert torch.equal(read.matrix, scores.matrix.double())


def test_json_without_a_matrix():
    assert Scores.from_json(Scores({"a": torch.ones(2)}).to_json()).matrix is None
    assert Scores.from_json('{"scores": {"a": [1]}}')["a"].tolist() == [1.0]


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_copies_keep_the_matrix(copied):
    scores = random_scores()
    assert torch.equal(copied(scores).matrix, scores.matrix)


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (torch.zeros(3, 3), "matrix has shape (3, 3), not (2, 2)"),
        (torch.zeros(2), "matrix has shape (2,), not (2, 2)"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "matrix is not symmetric: it differs from its "),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(matrix, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        Scores({"a": torch.ones(2)}, matrix)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"scores": {"a": 3}}',
        '{"scores": {"a": ["x"]}}',
        '{"scores": {"a": [1, 2]}, "matrix": [[1]]}',
        '{"scores": {"a": [1, 2]}, "matrix": [[1], [1]]}',
        '{"scores": {"a": [1, 2]}, "matrix": [[1, 2], [1]]}',
        '{"scores": {"a": [1, 2]}, "matrix": 3}',
    ],
)
def test_what_are_no_scores_says_what_scores_are(text):
    with pytest.raises(CheckpointError, match=r"^these are no scores \(") as caught:
        Scores.from_json(text)
    assert str(caught.value).endswith('"matrix": [[number, ...], ...] or null}')
