"""Continual-learning metrics: pure functions on counts.

Every rate comes from :class:`Counts` (correct, n), never from another rate, so that reports of
many devices merge by addition.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, TypeAlias

import msgspec


class Counts(msgspec.Struct, frozen=True, array_like=True):
    """How many predictions were correct, of how many."""

    correct: Annotated[int, msgspec.Meta(ge=0)]
    n: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.n:
            raise ValueError(f"expected 0 <= correct <= n, got correct={self.correct}, n={self.n}")

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.correct + other.correct, self.n + other.n)

    @property
    def accuracy(self) -> float:
        """Share of correct predictions; NaN where nothing was counted."""
        return self.correct / self.n if self.n else math.nan


def total(counts: Iterable[Counts]) -> Counts:
    """The sum of counts."""
    correct = n = 0
    for item in counts:
        correct, n = correct + item.correct, n + item.n
    return Counts(correct, n)


def wilson_interval(counts: Counts, *, z: float = 1.96) -> tuple[float, float]:
    """Score interval for a proportion (Wilson, JASA 22, 1927); (0, 1) where n is zero.

    Args:
        counts: Correct and total.
        z: Normal quantile; 1.96 gives 95 %.
    """
    if not counts.n:
        return 0.0, 1.0
    n, p = counts.n, counts.correct / counts.n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


Matrix: TypeAlias = Sequence[Sequence[Counts]]
"""Accuracy matrix R: row i after experience i, column j is the group that experience j taught.

Row 0 is the state before any learning on the device, column 0 what the bundle already knew; the
matrix is square, and the entries above its diagonal are groups not taught yet.
"""


def average_accuracy(matrix: Matrix) -> float:
    """ACC: mean accuracy over all groups after the last experience (Lopez-Paz, NeurIPS 2017)."""
    last = matrix[-1]
    return sum(cell.accuracy for cell in last) / len(last)


def forgetting(matrix: Matrix) -> float:
    """Mean over earlier groups of (best accuracy before the last experience - the last).

    Chaudhry et al., ECCV 2018, equation 3; 0 where there is only one experience. Negative where
    later experiences improved earlier groups.
    """
    last = len(matrix) - 1
    if last < 1:
        return 0.0
    drops = [
        max((row[group].accuracy for row in matrix[:last] if row[group].n), default=math.nan)
        - matrix[last][group].accuracy
        for group in range(last)
    ]
    return sum(drops) / len(drops)


def backward_transfer(matrix: Matrix) -> float:
    """BWT: mean over earlier groups of (last accuracy - accuracy when just learned).

    Lopez-Paz and Ranzato, NeurIPS 2017; 0 where there is only one experience.
    """
    last = len(matrix) - 1
    if last < 1:
        return 0.0
    changes = [
        matrix[last][group].accuracy - matrix[group][group].accuracy for group in range(last)
    ]
    return sum(changes) / len(changes)


def average_anytime_accuracy(matrix: Matrix) -> float:
    """Mean over experiences of the mean accuracy on the groups taught so far (Caccia 2022)."""
    rows = [
        sum(cell.accuracy for cell in row[: index + 1]) / (index + 1)
        for index, row in enumerate(matrix)
    ]
    return sum(rows) / len(rows)
