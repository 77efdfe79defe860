from __future__ import annotations

import numpy as np
import pytest

from edge_ll.novelty import NoveltyReference, fit_novelty


def blobs(rng, *, n=300, size=6, classes=3, spread=5.0):
    """Classes with one shared, correlated covariance."""
    means = rng.normal(size=(classes, size)) * spread
    mixing = rng.normal(size=(size, size))
    labels = np.arange(n) % classes
    x = means[labels] + rng.normal(size=(n, size)) @ mixing
    return x.astype(np.float32), labels.astype(np.int64)


def brute_force(x, labels, queries, directions):
    """Mahalanobis distance to the nearest class mean, from the definition, in the leading plane."""
    x, queries = x.astype(np.float64), queries.astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False))
    basis = vectors[:, np.argsort(values)[::-1][:directions]]
    means = {c: x[labels == c].mean(axis=0) for c in np.unique(labels)}
    within = np.stack([row - means[c] for row, c in zip(x, labels, strict=True)]) @ basis
    covariance = within.T @ within / (len(x) - 1)
    covariance += np.eye(len(covariance)) * (1e-3 * np.trace(covariance) / len(covariance) + 1e-9)
    inverse = np.linalg.inv(covariance)
    gaps = [(queries - mean) @ basis for mean in means.values()]
    return np.sqrt(np.min([np.einsum("nd,de,ne->n", gap, inverse, gap) for gap in gaps], axis=0))


@pytest.mark.parametrize("directions", [1, 3, 6, 32])
def test_the_score_is_the_mahalanobis_distance_to_the_nearest_class(directions):
    rng = np.random.default_rng(1)
    x, labels = blobs(rng)
    queries = rng.normal(size=(50, 6)).astype(np.float32) * 8
    reference = fit_novelty(x, labels, queries, directions=directions)
    expected = brute_force(x, labels, queries, directions)
    assert reference.projection.shape == (6, min(directions, 6))
    assert reference.score(queries) == pytest.approx(expected, rel=1e-3)
    assert reference.scores == pytest.approx(np.sort(expected), rel=1e-3)
    assert {part.dtype for part in reference} == {np.dtype(np.float32)}


def test_labels_are_names_not_positions():
    rng = np.random.default_rng(2)
    x, labels = blobs(rng)
    plain = fit_novelty(x, labels, x)
    renamed = fit_novelty(x, labels * 7 + 100, x)
    assert np.array_equal(plain.scores, renamed.scores)


def test_latents_of_any_shape_are_flattened():
    rng = np.random.default_rng(3)
    x, labels = blobs(rng)
    flat, cubes = fit_novelty(x, labels, x), fit_novelty(x.reshape(-1, 2, 3), labels, x)
    assert np.array_equal(flat.score(x), cubes.score(x.reshape(-1, 3, 1, 2)))


@pytest.mark.parametrize("tied", [False, True])
def test_ranks_are_uniform_where_nothing_drifts(tied):
    """Kolmogorov-Smirnov: past 1.95 / sqrt(n) once in a thousand seeds."""
    rng = np.random.default_rng(4)
    x, labels = blobs(rng, n=9000)
    reference = fit_novelty(x[:1000], labels[:1000], x[1000:5000])
    scores = reference.score(x[5000:])
    if tied:  # coarse scores: many ties, broken at random
        reference = reference._replace(scores=np.round(reference.scores))
        scores = np.round(scores)
    ranks = np.sort(reference.rank(scores, rng))
    n = len(ranks)
    gap = np.max(np.abs(ranks - (np.arange(n) + 0.5) / n))
    # Both samples are finite: 4000 references and 4000 queries.
    assert gap < 1.95 * np.sqrt(2 / n)
    assert ranks[0] >= 0
    assert ranks[-1] < 1


def test_far_data_ranks_high_and_familiar_data_does_not():
    rng = np.random.default_rng(5)
    x, labels = blobs(rng, n=600)
    reference = fit_novelty(x[:300], labels[:300], x[300:])
    far = reference.rank(reference.score(x[300:] + 200), rng)
    assert far.min() > 0.99
    assert reference.rank(reference.score(x[300:]), rng).mean() == pytest.approx(0.5, abs=0.02)


def test_more_novel_never_ranks_lower():
    reference = NoveltyReference(
        np.zeros(1, np.float32),
        np.ones((1, 1), np.float32),
        np.zeros((1, 1), np.float32),
        np.array([1, 2, 2, 3], np.float32),
    )
    scores = np.array([0, 1, 1.5, 2, 2.5, 3, 9], np.float32)
    rng = np.random.default_rng(6)
    drawn = np.stack([reference.rank(scores, rng) for _ in range(2000)])
    # (below, below + ties + 1) / 5 bounds each rank; their middle is its mean.
    low = np.array([0, 0, 1, 1, 3, 3, 4]) / 5
    high = np.array([1, 2, 2, 4, 4, 5, 5]) / 5
    assert (drawn >= low).all()
    assert (drawn < high).all()
    assert drawn.mean(axis=0) == pytest.approx((low + high) / 2, abs=0.02)


def test_the_same_seed_gives_the_same_ranks():
    rng = np.random.default_rng(7)
    x, labels = blobs(rng)
    reference = fit_novelty(x, labels, x)
    first, second = (reference.rank(reference.scores, np.random.default_rng(8)) for _ in range(2))
    assert np.array_equal(first, second)


def constant_feature(x):
    x[:, 2] = 5.0
    return x


AWKWARD = [
    ("a constant feature", lambda x: constant_feature(x.copy()), 300),
    ("all features constant", np.ones_like, 30),
    ("a large offset", lambda x: x + 1e3, 300),
    ("fewer samples than directions", lambda x: x, 4),
    ("one sample a class", lambda x: x, 3),
    ("duplicated features", lambda x: np.repeat(x, 8, axis=1), 300),
]


@pytest.mark.parametrize(("change", "n"), [row[1:] for row in AWKWARD], ids=[r[0] for r in AWKWARD])
def test_awkward_data_gives_finite_scores(change, n):
    rng = np.random.default_rng(9)
    x, labels = blobs(rng, n=n)
    x = change(x)
    reference = fit_novelty(x, labels, x)
    assert reference.projection.shape == (x.shape[1], min(32, n, x.shape[1]))
    for part in reference:
        assert np.isfinite(part).all()
    assert np.isfinite(reference.score(x * 3 + 1)).all()


def test_a_constant_feature_changes_no_score():
    rng = np.random.default_rng(10)
    x, labels = blobs(rng)
    wider = np.concatenate([x, np.full((len(x), 1), 3, np.float32)], axis=1)
    plain, wide = fit_novelty(x, labels, x), fit_novelty(wider, labels, wider, directions=6)
    assert wide.scores == pytest.approx(plain.scores, rel=1e-3)


def test_an_empty_batch_has_no_scores():
    rng = np.random.default_rng(11)
    x, labels = blobs(rng)
    assert fit_novelty(x, labels, x).score(x[:0]).shape == (0,)
