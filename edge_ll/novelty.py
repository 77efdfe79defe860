"""How new a latent looks beside the data that the bundle was made from.

The score is the distance to the nearest class mean in a whitened subspace of the latents, the
Mahalanobis distance of Lee et al. (NeurIPS 2018) under a shared covariance, truncated to its
leading directions. The export fits it; the device only evaluates it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

_BASIS_SAMPLES = 2000  # for the leading directions; large latents make the decomposition slow


class NoveltyReference(NamedTuple):
    """What the device needs to score latents.

    Attributes:
        center: float32 [D], mean of the training latents.
        projection: float32 [D, k], whitening directions.
        class_means: float32 [C, k], class means after whitening.
        scores: float32 [n], ascending scores of held-out samples of the known classes.
    """

    center: Float32
    projection: Float32
    class_means: Float32
    scores: Float32

    def whiten(self, latents: Float32) -> Float32:
        """Latents [N, ...] in the whitened subspace: float32 [N, k]."""
        flat = latents.reshape(len(latents), len(self.center))
        points: Float32 = ((flat - self.center) @ self.projection).astype(np.float32)
        return points

    def score(self, latents: Float32, more_means: Float32 | None = None) -> Float32:
        """Distance to the nearest class mean: float32 [N] for float32 [N, ...] latents.

        ``more_means`` float32 [M, k], whitened, are those of classes learned since.
        """
        means = self.class_means
        if more_means is not None:
            means = np.concatenate([means, more_means])
        squares = np.square(self.whiten(latents)[:, None, :] - means[None]).sum(axis=2)
        nearest: Float32 = np.sqrt(squares.min(axis=1)).astype(np.float32)
        return nearest

    def rank(self, scores: Float32, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """Randomised rank among the reference scores: uniform on (0, 1) where nothing drifts.

        Ties and the finite reference are broken at random: (below + U * (ties + 1)) / (n + 1).
        """
        below = np.searchsorted(self.scores, scores, side="left")
        above = np.searchsorted(self.scores, scores, side="right")
        spread = rng.random(len(scores)) * (above - below + 1)
        ranks: npt.NDArray[np.float64] = (below + spread) / (len(self.scores) + 1)
        return ranks


def fit_novelty(
    latents: Float32, labels: npt.NDArray[np.int64], held_out: Float32, *, directions: int = 32
) -> NoveltyReference:
    """Fit the reference.

    Args:
        latents: float32 [N, ...] training latents of the known classes.
        labels: int64 [N] their classes.
        held_out: float32 [M, ...] latents that the student was not trained on: scores of training
            samples would be too small and call every new sample novel.
        directions: How many leading directions of the within-class covariance are kept.
    """
    flat = latents.reshape(len(latents), -1).astype(np.float64)
    center = flat.mean(axis=0)
    classes = np.unique(labels)
    means = np.stack([flat[labels == label].mean(axis=0) for label in classes])
    within = flat - means[np.searchsorted(classes, labels)]
    # All directions that vary: by total covariance, so that the classes stay apart, then whitened
    # by the covariance within classes. Many samples say no more than some: take them evenly.
    some = np.unique(np.linspace(0, len(flat) - 1, _BASIS_SAMPLES).astype(np.int64))
    _, _, basis = np.linalg.svd(flat[some] - center, full_matrices=False)
    basis = basis[: min(directions, len(basis))].T
    covariance = np.cov(within @ basis, rowvar=False).reshape(basis.shape[1], basis.shape[1])
    covariance += np.eye(len(covariance)) * (1e-3 * np.trace(covariance) / len(covariance) + 1e-9)
    values, vectors = np.linalg.eigh(covariance)
    projection = basis @ vectors / np.sqrt(values)
    reference = NoveltyReference(
        center=center.astype(np.float32),
        projection=projection.astype(np.float32),
        class_means=((means - center) @ projection).astype(np.float32),
        scores=np.zeros(0, np.float32),
    )
    return reference._replace(scores=np.sort(reference.score(held_out)))
