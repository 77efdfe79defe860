"""Drift with a false-alarm promise: a Shiryaev-Roberts e-detector on bounded scores.

Shin, Ramdas and Rinaldo, "E-detectors" (NEJSDS 2024): for scores in [0, 1] whose mean is at most m
while nothing drifts, each bet k follows ``M_k <- (M_k + 1)(1 + λ_k (x - m))``; the mean of the M_k
reaches A after A samples on average or later, so an alarm at A keeps that average run length.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from edge_ll.engine.port import Float32, Int64
from edge_ll.manifest import Manifest
from edge_ll.messages import Evidence
from edge_ll.novelty import NoveltyReference

Float64 = npt.NDArray[np.float64]

BETS = 8
ENOUGH = 20  # labelled samples before a learned class has a mean to compare with
_LARGEST_BET = 0.98  # of the bet at which a score of zero would end the game
_STANDARD_ERRORS = 3.0


class EDetector:
    """Two-sided: evidence that the mean of scores in [0, 1] has left [low, high].

    Args:
        low: Smallest mean without drift.
        high: Largest mean without drift.
        average_run_length: A: samples between false alarms, on average, at least.
    """

    def __init__(self, *, low: float, high: float, average_run_length: float) -> None:
        if not 0 < low <= high < 1:
            raise ValueError(f"expected 0 < low <= high < 1, got low={low}, high={high}")
        # A fall of x below `low` is a rise of 1 - x above 1 - low.
        self._means = np.array([high, 1 - low])[:, None]
        shares = np.geomspace(0.1, 1.0, BETS)
        targets = self._means + (1 - self._means) * shares
        bets = (targets - self._means) / (self._means * (1 - self._means))
        self._bets = np.minimum(bets, _LARGEST_BET / self._means)
        self._log_m = np.full(self._bets.shape, -np.inf)
        self._threshold = math.log(average_run_length)
        self._peak = -math.inf
        self._n = 0

    def update(self, x: float) -> None:
        """Take one score in [0, 1]."""
        sides = np.array([x, 1 - x])[:, None]
        self._log_m = np.logaddexp(self._log_m, 0.0) + np.log1p(self._bets * (sides - self._means))
        self._n += 1
        self._peak = max(self._peak, self.log_evidence)

    @property
    def log_evidence(self) -> float:
        """Logarithm of the mean of all M."""
        return float(np.logaddexp.reduce(self._log_m, axis=None)) - math.log(self._log_m.size)

    @property
    def alarm(self) -> bool:
        """Whether the evidence has ever reached the threshold."""
        return self._peak >= self._threshold

    def state(self) -> Float64:
        """Everything it has gathered: log M of every bet, then the peak and the count."""
        return np.concatenate([self._log_m.ravel(), [self._peak, self._n]])

    def restore(self, state: Float64) -> None:
        """Go on from :meth:`state`; one of another shape is ignored, and the watch begins anew."""
        if state.shape == (self._log_m.size + 2,):
            self._log_m = state[:-2].reshape(self._log_m.shape).copy()
            self._peak, self._n = float(state[-2]), int(state[-1])

    def evidence(self) -> Evidence:
        """The state for a report; shown as 0 before the first score."""
        now, peak = (self.log_evidence, self._peak) if self._n else (0.0, 0.0)
        return Evidence(now=now, peak=peak, threshold=self._threshold, n=self._n)


class DriftMonitor:
    """Watches how new the latents look beside the classes that are known.

    Known are the classes of the bundle's reference, and each class learned on the device once it
    has shown enough labelled samples for a mean of its own: learned classes are no drift. The
    scores are ranked among the reference's, which were made from held-out samples.

    Unlabelled samples are watched, and labelled ones of base classes. A sample labelled as a class
    learned here is not: it helps to make the mean that it would be compared with. Nor is one that
    is predicted to be a class which the bundle brought without a reference for it.

    Args:
        reference: The bundle's.
        manifest: The bundle's: what the reference covers, and the promise to keep.
        rng: Breaks ties of ranks.
    """

    def __init__(
        self, reference: NoveltyReference, manifest: Manifest, rng: np.random.Generator
    ) -> None:
        settings, capacity = manifest.drift, manifest.capacity
        self._reference = reference
        self._base = np.zeros(capacity, bool)
        self._base[list(manifest.base_classes)] = True
        self._unreferenced = np.zeros(capacity, bool)
        self._unreferenced[list(manifest.known_classes)] = True
        self._unreferenced &= ~self._base
        self._counts = np.zeros(capacity)
        self._sums = np.zeros((capacity, reference.projection.shape[1]))
        self._rng = rng
        # Ranks in a reference of n samples have mean 1/2 up to the reference's own error.
        margin = _STANDARD_ERRORS / math.sqrt(12 * max(len(reference.scores), 1))
        margin = min(margin + settings.tolerance, 0.45)
        self._novelty = EDetector(
            low=0.5 - margin,
            high=0.5 + margin,
            average_run_length=settings.average_run_length,
        )

    def observe(self, latents: Float32, labels: Int64, predicted: Int64) -> Float64:
        """Take what is to be watched, and skip the rest.

        Args:
            latents: float32 [N, ...].
            labels: int64 [N], -1 where nobody said.
            predicted: int64 [N].

        Returns:
            The ranks of the samples taken, in (0, 1), high where they look new.
        """
        learned = self._learned()
        unlabelled = self._base | learned | ~self._unreferenced
        taken = latents[np.where(labels < 0, unlabelled[predicted], self._base[labels])]
        means = (self._sums[learned] / self._counts[learned, None]).astype(np.float32)
        ranks = self._reference.rank(self._reference.score(taken, means), self._rng)
        for rank in ranks.tolist():
            self._novelty.update(rank)
        return ranks

    def learn(self, latents: Float32, labels: Int64) -> None:
        """Take labelled samples into the means of the classes learned here."""
        np.add.at(self._counts, labels, 1.0)
        np.add.at(self._sums, labels, self._reference.whiten(latents).astype(np.float64))

    @property
    def alarm(self) -> bool:
        """Whether any signal has raised an alarm."""
        return self._novelty.alarm

    def state(self) -> Float64:
        """For saving: the detector's state, then counts and sums per class, as one vector."""
        return np.concatenate([self._novelty.state(), self._counts, self._sums.ravel()])

    def restore(self, state: Float64) -> None:
        """Go on from :meth:`state`; one of another shape is ignored, and the watch begins anew."""
        own, classes = len(self._novelty.state()), len(self._counts)
        if state.shape == (own + classes + self._sums.size,):
            self._novelty.restore(state[:own])
            self._counts = state[own : own + classes].copy()
            self._sums = state[own + classes :].reshape(self._sums.shape).copy()

    def evidence(self) -> dict[str, Evidence]:
        """State per signal."""
        return {"novelty": self._novelty.evidence()}

    def _learned(self) -> npt.NDArray[np.bool_]:
        return ~self._base & (self._counts >= ENOUGH)
