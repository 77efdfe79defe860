"""The drift detector keeps its promise on false alarms, and still sees what drifts."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from edge_ll.manifest import DriftDefaults
from edge_ll.novelty import NoveltyReference
from edge_ll_device.drift import BETS, ENOUGH, DriftMonitor, EDetector
from edge_ll_device.student import Student
from tests.tiny_bundle import BASE, toy, write_tiny_bundle


def _detector(*, margin: float = 0.02, arl: float = 1e4) -> EDetector:
    return EDetector(low=0.5 - margin, high=0.5 + margin, average_run_length=arl)


def _run(detector: EDetector, scores) -> int | None:
    """After how many scores the alarm came; None without one."""
    for number, x in enumerate(scores, 1):
        detector.update(float(x))
        if detector.alarm:
            return number
    return None


def _peaks(detector: EDetector, streams: np.ndarray) -> np.ndarray:
    """Largest log evidence of each row: the same recursion for all rows at once."""
    bets, means = detector._bets[None], detector._means[None]
    log_m = np.full((len(streams), *detector._bets.shape), -np.inf)
    peaks = np.full(len(streams), -np.inf)
    for x in streams.T:
        sides = np.stack([x, 1 - x], axis=1)[:, :, None]
        log_m = np.logaddexp(log_m, 0.0) + np.log1p(bets * (sides - means))
        now = np.logaddexp.reduce(log_m.reshape(len(streams), -1), axis=1)
        peaks = np.maximum(peaks, now - math.log(log_m[0].size))
    return peaks


@pytest.mark.parametrize("bad", [(0.0, 0.5), (0.5, 1.0), (0.6, 0.4), (-0.1, 0.5)])
def test_means_must_lie_inside_the_unit_interval(bad):
    with pytest.raises(ValueError, match="0 < low <= high < 1"):
        EDetector(low=bad[0], high=bad[1], average_run_length=10)


def test_it_is_the_recursion_without_logarithms():
    rng = np.random.default_rng(0)
    for low, high in ((0.45, 0.55), (0.2, 0.3), (0.5, 0.5)):
        detector = EDetector(low=low, high=high, average_run_length=1e6)
        m = np.zeros((2, BETS))
        means = np.array([[high], [1 - low]])
        targets = means + (1 - means) * np.geomspace(0.1, 1.0, BETS)
        bets = np.minimum((targets - means) / (means * (1 - means)), 0.98 / means)
        for x in rng.random(200):
            detector.update(float(x))
            m = (m + 1) * (1 + bets * (np.array([[x], [1 - x]]) - means))
            assert detector.log_evidence == pytest.approx(math.log(m.mean()), abs=1e-9)


def test_every_bet_is_fair_or_worse_without_drift_and_never_ruinous():
    detector = _detector()
    for side in (0, 1):
        bets, mean = detector._bets[side], detector._means[side]
        assert (bets > 0).all()
        assert (1 + bets * (0 - mean) > 0).all()
    # The expected factor is linear in the mean of x, so one check covers every distribution.
    for true_mean in (0.48, 0.5, 0.52):
        sides = np.array([[true_mean], [1 - true_mean]])
        assert (1 + detector._bets * (sides - detector._means) <= 1 + 1e-12).all()


@pytest.mark.parametrize("dist", ["uniform", "two points", "at the margin"])
def test_false_alarms_stay_below_the_bound(dist):
    """P(alarm by T) <= T / A; here A = 20,000 and T = 2,000, so at most 10 % of the streams."""
    rng = np.random.default_rng(1)
    streams = {
        "uniform": lambda: rng.random((400, 2000)),
        "two points": lambda: rng.integers(0, 2, (400, 2000)).astype(float),
        "at the margin": lambda: (rng.random((400, 2000)) < 0.52).astype(float),
    }[dist]()
    alarms = int((_peaks(_detector(), streams) >= math.log(20_000)).sum())
    # 40 expected at the bound itself; 40 + 3 * sqrt(36).
    assert alarms <= 58


def test_the_vectorised_peaks_are_the_detector_s():
    streams = np.random.default_rng(2).random((3, 100))
    for row, peak in zip(streams, _peaks(_detector(), streams), strict=True):
        detector = _detector()
        _run(detector, row)
        assert detector.evidence().peak == pytest.approx(peak)


@pytest.mark.parametrize(
    ("low", "high", "within"),
    [(0.3, 1.0, 250), (0.6, 1.0, 60), (0.95, 1.0, 25), (0.0, 0.7, 250), (0.0, 0.4, 60)],
)
def test_shifted_scores_alarm_soon_in_both_directions(low, high, within):
    rng = np.random.default_rng(3)
    for _ in range(20):
        at = _run(_detector(), rng.uniform(low, high, within))
        assert at is not None


def test_an_alarm_comes_soon_after_a_long_calm():
    rng = np.random.default_rng(4)
    detector = _detector()
    assert _run(detector, rng.random(3000)) is None
    at = _run(detector, rng.uniform(0.5, 1, 150))
    assert at is not None


def test_the_peak_never_falls_and_the_alarm_stays():
    rng = np.random.default_rng(5)
    detector, peaks = _detector(), []
    for x in [*rng.uniform(0.8, 1, 60), *rng.random(500)]:
        detector.update(float(x))
        evidence = detector.evidence()
        peaks.append(evidence.peak)
        assert evidence.now <= evidence.peak
    assert peaks == sorted(peaks)
    assert detector.alarm
    assert detector.evidence().now < detector.evidence().threshold


def test_extremes_do_not_overflow():
    detector = _detector()
    for _ in range(20_000):
        detector.update(1.0)
    high = detector.log_evidence
    assert np.isfinite(high)
    assert high > 5_000  # e to this power is past every float
    for _ in range(20_000):
        detector.update(0.0)
    assert np.isfinite(detector.log_evidence)
    assert np.isfinite(detector._log_m).all()
    # A single huge step, as after a million samples.
    detector._log_m[:] = 1e6
    detector.update(1.0)
    assert detector.log_evidence == pytest.approx(1e6, rel=1e-3)


def test_evidence_before_the_first_score():
    evidence = _detector(arl=1e5).evidence()
    assert (evidence.now, evidence.peak, evidence.n) == (0.0, 0.0, 0)
    assert evidence.threshold == pytest.approx(math.log(1e5))
    assert not _detector().alarm


# The monitor


def _reference(n: int = 400, seed: int = 0) -> NoveltyReference:
    scores = np.sort(np.abs(np.random.default_rng(seed).normal(size=n))).astype(np.float32)
    return NoveltyReference(
        center=np.zeros(1, np.float32),
        projection=np.ones((1, 1), np.float32),
        class_means=np.zeros((1, 1), np.float32),
        scores=scores,
    )


def _monitor(n: int = 400, *, tolerance: float = 0.0, seed: int = 0) -> DriftMonitor:
    settings = DriftDefaults(average_run_length=1e4, tolerance=tolerance)
    manifest = SimpleNamespace(
        drift=settings, capacity=2, base_classes=(0, 1), known_classes=(0, 1)
    )
    return DriftMonitor(_reference(n, seed), manifest, np.random.default_rng(seed))


def _observe(monitor: DriftMonitor, latents: np.ndarray) -> np.ndarray:
    """As unlabelled samples, taken for class 0."""
    n = len(latents)
    return monitor.observe(latents, np.full(n, -1), np.zeros(n, np.int64))


def test_calm_latents_rarely_alarm_although_the_reference_is_small():
    """T / A = 0.1 per stream, over fresh references too: 40 streams, 10 alarms are far out."""
    alarms = 0
    for seed in range(40):
        monitor = _monitor(60, seed=seed)
        latents = np.random.default_rng(1000 + seed).normal(size=(1000, 1)).astype(np.float32)
        _observe(monitor, latents)
        alarms += monitor.alarm
    assert alarms < 10


@pytest.mark.parametrize("scale", [3.0, 0.2])
def test_latents_that_look_new_or_too_tame_alarm(scale):
    monitor = _monitor()
    latents = scale * np.random.default_rng(9).normal(size=(400, 1)).astype(np.float32)
    ranks = _observe(monitor, latents)
    assert ranks.shape == (400,)
    assert ((ranks > 0) & (ranks < 1)).all()
    assert monitor.alarm
    assert monitor.evidence()["novelty"].n == 400


def test_the_tolerance_is_a_shift_that_is_no_drift():
    latents = 1.25 * np.random.default_rng(9).normal(size=(3000, 1)).astype(np.float32)
    strict, lenient = _monitor(), _monitor(tolerance=0.2)
    _observe(strict, latents)
    _observe(lenient, latents)
    assert strict.evidence()["novelty"].peak > lenient.evidence()["novelty"].peak
    assert not lenient.alarm


@pytest.mark.parametrize("n", [0, 1, 5])
def test_a_tiny_reference_gives_ranks_and_no_error(n):
    monitor = _monitor(n)
    ranks = _observe(monitor, np.random.default_rng(0).normal(size=(50, 1)).astype(np.float32))
    assert ((ranks >= 0) & (ranks <= 1)).all()
    assert not monitor.alarm


def test_ranks_of_ties_are_spread():
    reference = _reference()._replace(scores=np.ones(99, np.float32))
    ranks = reference.rank(np.ones(4000, np.float32), np.random.default_rng(0))
    assert 0.48 < ranks.mean() < 0.52
    assert ranks.std() == pytest.approx(1 / math.sqrt(12), abs=0.02)


def test_latents_that_are_not_finite_do_not_blind_the_monitor():
    monitor = _monitor()
    with np.errstate(all="ignore"):
        _observe(monitor, np.array([[np.inf], [np.nan]], np.float32))
    assert np.isfinite(monitor.evidence()["novelty"].now)


def _student(tmp_path, **changes) -> Student:
    from edge_ll.engine.load import open_engine
    from edge_ll_device.config import LearningConfig

    bundle = write_tiny_bundle(tmp_path / "b", **changes)
    return Student(bundle, open_engine(bundle), LearningConfig())


def _take(student: Student, x, y, *, labelled: bool = True) -> None:
    from edge_ll_device.source import Sample

    samples = [Sample(a, int(b) if labelled else None, 1) for a, b in zip(x, y, strict=True)]
    for at in range(0, len(samples), 8):
        student.take(samples[at : at + 8])


def test_a_class_being_learned_is_no_drift_but_unlabelled_it_is(tmp_path):
    new = toy((2, 3), 400, seed=20)
    student = _student(tmp_path)
    _take(student, *(part[:ENOUGH] for part in new))
    assert student.drift.evidence()["novelty"].n == 0
    student = _student(tmp_path)
    _take(student, *new, labelled=False)
    assert student.drift.alarm


def test_a_class_learned_here_is_watched_against_its_own_mean(tmp_path):
    student = _student(tmp_path)
    _take(student, *toy((2, 3), 400, seed=20))
    _take(student, *toy((2, 3), 400, seed=23), labelled=False)
    assert student.drift.evidence()["novelty"].n == 400
    assert not student.drift.alarm
    _take(student, *toy((2, 3), 400, seed=24, shift=2.0), labelled=False)
    assert student.drift.alarm


def test_a_class_that_the_bundle_brought_without_reference_is_not_watched(tmp_path):
    """A merged bundle knows more classes than its reference covers."""
    student = _student(tmp_path, known_classes=(*BASE, 2, 3))
    monitor = student.drift
    latents = student.learner.encode(toy((2, 3), 40, seed=25)[0])
    assert len(monitor.observe(latents, np.full(40, -1), np.full(40, 2))) == 0
    assert len(monitor.observe(latents, np.full(40, -1), np.full(40, 0))) == 40


def test_base_classes_are_watched_labelled_or_not(tmp_path):
    for labelled in (True, False):
        student = _student(tmp_path)
        _take(student, *toy(BASE, 200, seed=21), labelled=labelled)
        assert student.drift.evidence()["novelty"].n == 200
        assert not student.drift.alarm


def test_a_shift_of_the_base_classes_is_drift(tmp_path):
    student = _student(tmp_path)
    _take(student, *toy(BASE, 400, seed=22, shift=2.0))
    assert student.drift.alarm
