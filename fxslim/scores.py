"""Scores: how much each head matters, and how much heads matter together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import torch

from fxslim.errors import CheckpointError

__all__ = ["Scores"]


class Scores(dict[str, torch.Tensor]):
    """For each site by name, a tensor (heads,); higher matters more.

    Attributes:
        matrix: what removing heads together costs, if the criterion says: symmetric and positive
            semidefinite, (all heads, all heads), in the order of the sites and their heads.
            Removing a set S costs the sum of ``matrix[S][:, S]``.

    >>> scores = Scores({"a": torch.tensor([1.0, 2.0])}, torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
    >>> Scores.from_json(scores.to_json()).matrix.sum().item()
    3.0

    Raises:
        ValueError: `matrix` does not fit the scores, or is not symmetric.
    """

    def __init__(
        self,
        scores: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] = (),
        matrix: torch.Tensor | None = None,
    ) -> None:
        super().__init__(scores)
        self.matrix = matrix
        if matrix is not None:
            _check_matrix(matrix, sum(values.numel() for values in self.values()))

    def to_json(self) -> str:
        """The scores as JSON: ``{"scores": {site: [...]}, "matrix": lower triangle by rows}``."""
        rows = None if self.matrix is None else self.matrix.tolist()
        triangle = rows and [row[: number + 1] for number, row in enumerate(rows)]
        scores = {name: values.tolist() for name, values in self.items()}
        return json.dumps({"scores": scores, "matrix": triangle})

    @classmethod
    def from_json(cls, text: str) -> Scores:
        """Read back what `to_json` wrote: the same numbers, in float64.

        Raises:
            CheckpointError: the text holds no scores.
        """
        try:
            data = json.loads(text)
            scores = {str(n): _vector(values) for n, values in data["scores"].items()}
            rows = data.get("matrix")
            return cls(scores, None if rows is None else _symmetric(rows))
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"these are no scores ({type(error).__name__}: {error}); "
                'expected {"scores": {site: [number, ...]}, "matrix": [[number, ...], ...] or null}'
            ) from error


def _vector(values: Iterable[float]) -> torch.Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def _symmetric(rows: list[list[float]]) -> torch.Tensor:
    """The matrix of which `rows` are the lower triangle."""
    size = len(rows)
    if [len(row) for row in rows] != list(range(1, size + 1)):
        raise ValueError("the matrix is no lower triangle")
    lower = torch.zeros(size, size, dtype=torch.float64)
    below = torch.tril_indices(size, size)
    lower[below[0], below[1]] = _vector(value for row in rows for value in row)
    return lower + lower.tril(-1).mT


def _check_matrix(matrix: torch.Tensor, heads: int) -> None:
    if tuple(matrix.shape) != (heads, heads):
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}, not ({heads}, {heads})")
    rounding = 1e-5 * matrix.abs().max().item() if heads else 0.0
    if not torch.allclose(matrix, matrix.mT, rtol=0.0, atol=rounding, equal_nan=True):
        worst = (matrix - matrix.mT).abs().max().item()
        raise ValueError(f"matrix is not symmetric: it differs from its transpose by {worst:.3g}")
