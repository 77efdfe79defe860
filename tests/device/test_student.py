"""A bundle at work: every sample is counted once, refused ones cost the others nothing."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from edge_ll.bundle import BACKBONE
from edge_ll.engine.load import open_engine
from edge_ll.errors import EngineError
from edge_ll.metrics import Counts
from edge_ll_device.config import LearningConfig
from edge_ll_device.offline import learn_stream
from edge_ll_device.source import RecordedStream, Sample
from edge_ll_device.student import Student, Tally
from tests.tiny_bundle import (
    BASE,
    LABELS,
    LATENT,
    LEARNER,
    SHAPE,
    tiny_arrays,
    toy,
    write_stream,
    write_tiny_bundle,
)


def _student(path, *, learning: LearningConfig | None = None, **changes) -> Student:
    bundle = write_tiny_bundle(path, **changes)
    return Student(bundle, open_engine(bundle), learning or LearningConfig())


@pytest.fixture
def student(tmp_path) -> Student:
    return _student(tmp_path / "toy.bundle")


def _samples(x, y, experience=1) -> list[Sample]:
    return [Sample(a, None if b < 0 else int(b), experience) for a, b in zip(x, y, strict=True)]


def _take(student, x, y, experience=1) -> None:
    samples = _samples(x, y, experience)
    for at in range(0, len(samples), 8):
        student.take(samples[at : at + 8])


def test_it_starts_with_exemplars_and_empty_counts(student):
    assert len(student.learner.buffer) == 40
    assert student.learner.buffer.class_counts == [20, 20, 0, 0]
    assert student.tally == Tally()
    assert student.ref.name == "toy"
    assert student.ref.digest == student.bundle.digest
    assert student.backbone == student.bundle.manifest.files[BACKBONE].sha256


@pytest.mark.parametrize("what", ["latents", "logits"])
def test_samples_that_the_runtime_cannot_take_are_refused_and_the_next_are_taken(student, what):
    """As when they need more memory than the runtime may have."""

    def fail(*_):
        raise EngineError("no memory")

    x, y = toy(BASE, 8)
    engine = student.learner.engine
    setattr(engine, what, fail)
    _take(student, x, y)
    assert (student.tally.taken, student.tally.refused, student.tally.learned) == (8, 8, 0)
    delattr(engine, what)
    _take(student, x, y)
    assert (student.tally.taken, student.tally.refused, student.tally.learned) == (16, 8, 8)


@pytest.mark.parametrize(
    ("learning", "entries"),
    [
        (LearningConfig(replay=False), 0),
        (LearningConfig(buffer_entries=10), 10),
        (LearningConfig(replay=False, buffer_entries=10), 0),
    ],
)
def test_the_device_s_settings_decide_the_buffer(tmp_path, learning, entries):
    student = _student(tmp_path / "b", learning=learning)
    assert len(student.learner.buffer) == entries


def test_every_sample_is_counted_once(student):
    x, y = toy(BASE, 20)
    y = np.where(np.arange(20) < 5, -1, y)  # the first five unlabelled
    _take(student, x, y)
    tally = student.tally
    assert (tally.taken, tally.seen, tally.learned, tally.refused) == (20, 20, 15, 0)
    assert tally.prequential.n == 15
    assert tally.prequential.accuracy > 0.9
    assert tally.experience == 1
    assert tally.loss is not None


def test_the_prediction_is_made_before_the_label_is_learned(student):
    _take(student, *toy((2,), 8))
    assert student.tally.prequential == Counts(0, 8)
    _take(student, *toy((2,), 80, seed=5))
    assert student.tally.prequential.correct > 60


def test_nothing_taken_changes_nothing(student):
    student.take([])
    assert student.tally == Tally()


BAD = {
    "shape": Sample(np.zeros((3, 3), np.float32), 0, 1),
    "dtype": Sample(np.zeros(SHAPE, np.float64), 0, 1),
    "nan": Sample(np.full(SHAPE, np.nan, np.float32), 0, 1),
    "unlabelled nan": Sample(np.full(SHAPE, np.nan, np.float32), None, 1),
    "label": Sample(np.zeros(SHAPE, np.float32), 4, 1),
    "huge label": Sample(np.zeros(SHAPE, np.float32), 2**70, 1),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_refused_sample_costs_the_others_nothing(tmp_path, bad):
    with_bad, without = _student(tmp_path / "a"), _student(tmp_path / "b")
    good = _samples(*toy(BASE, 7))
    with_bad.take([*good[:3], bad, *good[3:]])
    without.take(good)
    assert with_bad.tally == replace(without.tally, taken=8, refused=1)
    assert np.array_equal(with_bad.learner.engine.theta, without.learner.engine.theta)


def test_a_finite_sample_that_overflows_costs_the_others_nothing(tmp_path):
    """Finite inputs may still overflow in the graph: 3e38 times any weight above one."""
    student = _student(tmp_path / "a")
    with np.errstate(all="ignore"):
        student.take([*_samples(*toy(BASE, 7)), Sample(np.full(SHAPE, 3e38, np.float32), 0, 1)])
    assert student.tally.learned == 7
    assert student.tally.refused == 1


def test_a_batch_of_refused_samples_only(student):
    student.take(list(BAD.values()))
    tally = student.tally
    assert (tally.taken, tally.seen, tally.refused) == (6, 0, 6)
    assert student.learner.steps == 0


def test_a_refused_step_is_counted_and_the_agent_goes_on(student, monkeypatch):
    def refuse(batch):
        raise EngineError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(student.learner.engine, "step", refuse)
        student.take(_samples(*toy(BASE, 8)))
    tally = student.tally
    assert (tally.seen, tally.learned, tally.refused) == (8, 0, 8)
    student.take(_samples(*toy(BASE, 8)))
    assert student.tally.learned == 8


def test_the_same_seed_gives_the_same_student(tmp_path):
    one, two = _student(tmp_path / "a"), _student(tmp_path / "b")
    for student in (one, two):
        _take(student, *toy((0, 1, 2), 40))
    assert np.array_equal(one.learner.engine.theta, two.learner.engine.theta)
    assert one.drift.evidence() == two.drift.evidence()


# Another bundle takes over


def _learned(path) -> Student:
    student = _student(path)
    _take(student, *toy((0, 1, 2), 80, seed=3))
    return student


def test_the_same_backbone_keeps_buffer_counts_and_drift(tmp_path):
    old, new = _learned(tmp_path / "a"), _student(tmp_path / "b", version=2)
    said = new.adopt(old)
    assert "kept 60 replay entries" in said
    assert new.tally == replace(old.tally, learned_here=0)
    assert new.drift.evidence() == old.drift.evidence()
    assert new.learner.known_classes == (0, 1, 2)
    for a, b in zip(new.learner.buffer.state(), old.learner.buffer.state(), strict=True):
        assert np.array_equal(a, b)
    assert np.array_equal(new.learner.engine.theta, new.bundle.theta())


def test_another_backbone_starts_the_buffer_anew(tmp_path):
    old, new = _learned(tmp_path / "a"), _student(tmp_path / "b", version=2, gain=2.0)
    assert "backbone changed" in new.adopt(old)
    assert new.tally == replace(old.tally, learned_here=0)
    assert new.learner.buffer.class_counts == [20, 20, 0, 0]
    assert new.learner.known_classes == BASE
    assert new.drift.evidence()["novelty"].n == 0


@pytest.mark.parametrize("capacity", [3, 6])
def test_another_capacity_on_the_same_backbone_still_works(tmp_path, capacity):
    old = _student(tmp_path / "a")
    _take(old, *toy((0, 1, 2, 3), 80, seed=3))
    groups = {"base": BASE, "experience-1": (2,)}
    arrays = tiny_arrays()
    inside = arrays["anchor_labels"] < capacity
    arrays |= {name: arrays[name][inside] for name in ("anchor_latents", "anchor_labels")}
    new = _student(
        tmp_path / "b", version=2, capacity=capacity, anchor_groups=groups, arrays=arrays
    )
    new.adopt(old)
    assert max(new.learner.known_classes) < capacity
    new.learner.anchor_counts()
    before = new.tally
    new.take(_samples(*toy((capacity - 1,), 8, seed=4)))
    assert new.tally.learned == before.learned + 8
    assert new.learner.buffer.class_counts[capacity - 1] >= 1


def test_labels_that_moved_do_not_carry_old_memories_over(tmp_path):
    """Class 2 was a cedar; in the new bundle number 2 is a dogwood."""
    old = _learned(tmp_path / "a")
    labels = (LABELS[0], LABELS[1], LABELS[3], LABELS[2])
    new = _student(tmp_path / "b", version=2, labels=labels)
    new.adopt(old)
    assert new.learner.buffer.class_counts[2] == 0
    assert 2 not in new.learner.known_classes


def test_another_quantizer_on_the_same_backbone_keeps_the_latents(tmp_path):
    old = _learned(tmp_path / "a")
    arrays = tiny_arrays()
    wider = {
        "latent_scale": arrays["latent_scale"] * np.float32(2),
        "latent_zero": arrays["latent_zero"] // 2,
    }
    new = _student(tmp_path / "b", version=2, arrays=wider)
    new.adopt(old)
    kept, labels = new.learner.buffer.sample(200)
    for label in (0, 1, 2):
        mean = kept[labels == label].mean(axis=0)
        assert np.abs(mean - 2.5 * np.eye(LATENT)[label]).max() < 0.7


# Offline


def test_a_stream_is_learned_as_the_agent_would(tmp_path, student):
    path = write_stream(tmp_path / "s.npz", toy((2,), 61), toy((3,), 40, seed=1))
    result = learn_stream(student, RecordedStream(path))
    assert len(result["anchors"]) == 3
    assert (result["seen"], result["learned"], result["refused"]) == (101, 101, 0)
    assert result["prequential"].n == 101
    assert result["anchors"][0]["experience-1"].correct == 0
    assert min(counts.accuracy for counts in result["anchors"][2].values()) > 0.85
    assert result["rss_bytes"] > 1_000_000
    assert not result["drift"]


def test_batches_never_mix_experiences(tmp_path, student):
    sizes = []
    take = student.take
    student.take = lambda batch: (sizes.append({s.experience for s in batch}), take(batch))
    path = write_stream(tmp_path / "s.npz", toy((2,), 13), toy((3,), 3))
    learn_stream(student, RecordedStream(path))
    assert sizes == [{1}, {1}, {2}]
    assert LEARNER.batch_new == 8


# Drift


def test_learned_classes_without_labels_are_no_drift(student):
    _take(student, *toy((2, 3), 200, seed=5))
    unlabelled = [Sample(x, None, 2) for x in toy((0, 1, 2, 3), 400, seed=6)[0]]
    for at in range(0, len(unlabelled), 8):
        student.take(unlabelled[at : at + 8])
    assert student.drift.evidence()["novelty"].n == 400
    assert not student.drift.alarm


def test_what_was_learned_goes_on_after_a_restart(tmp_path):
    old, new = _learned(tmp_path / "a"), _student(tmp_path / "b")
    student_drift = [Sample(x, None, 1) for x in toy(BASE, 50, seed=7)[0]]
    old.take(student_drift)
    new.restore(old.learned())
    assert new.tally == old.tally
    assert new.drift.evidence() == old.drift.evidence()
    assert np.array_equal(new.learner.engine.theta, old.learner.engine.theta)
