"""The learner on the numpy engine: it learns new classes, keeps old ones, and can go back."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from edge_ll.engine import EngineState
from edge_ll.engine.fake import FakeEngine
from edge_ll.errors import EngineError, SampleError
from edge_ll.metrics import Counts
from edge_ll_device.learner import Anchors, Learner, latent_quantizer
from edge_ll_device.replay import ReplayBuffer
from tests.tiny_bundle import (
    BASE,
    CAPACITY,
    LATENT,
    LEARNER,
    SHAPE,
    base_theta,
    toy,
    write_tiny_bundle,
)

ALL = tuple(range(CAPACITY))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "toy.bundle")


class Failing(FakeEngine):
    """Refuses every step from number ``after`` on."""

    after = 0

    def step(self, batch):
        if self.after <= 0:
            raise EngineError("refused")
        self.after -= 1
        return super().step(batch)


def _learner(bundle, *, entries: int = 60, seed: int = 0, engine=FakeEngine, **manifest):
    described = replace(bundle.manifest, **manifest)
    quantizer = latent_quantizer(bundle.array)
    buffer = ReplayBuffer(
        entries,
        (LATENT,),
        classes=CAPACITY,
        quantizer=quantizer,
        rng=np.random.default_rng(seed),
    )
    buffer.add(quantizer.decode(bundle.array("exemplar_latents")), bundle.array("exemplar_labels"))
    anchors = Anchors(
        quantizer.decode(bundle.array("anchor_latents")), bundle.array("anchor_labels")
    )
    made = engine(LATENT, CAPACITY, described.learner)
    made.set_theta(base_theta())
    return Learner(made, described, anchors=anchors, buffer=buffer)


def _teach(learner, classes, n=80, seed=50):
    x, y = toy(classes, n, seed=seed)
    latents = learner.encode(x)
    for at in range(0, n, 8):
        learner.learn(latents[at : at + 8], y[at : at + 8])


def _flat(snapshot):
    return [
        snapshot.engine.theta.tobytes(),
        snapshot.engine.optimizer,
        *(part.tobytes() for part in snapshot.buffer),
        snapshot.known.tobytes(),
        snapshot.steps,
    ]


def test_replay_forgets_less_than_naive_learning(bundle):
    after = {}
    for name, entries in (("replay", 60), ("naive", 0)):
        learner = _learner(bundle, entries=entries)
        assert learner.anchor_counts()["base"].accuracy > 0.95
        _teach(learner, (2,))
        _teach(learner, (3,), seed=51)
        after[name] = {key: c.accuracy for key, c in learner.anchor_counts().items()}
    assert min(after["replay"].values()) > 0.9
    assert after["naive"]["experience-2"] > 0.9
    assert after["replay"]["base"] > after["naive"]["base"] + 0.2


def test_only_known_classes_are_predicted(bundle):
    learner = _learner(bundle)
    x, _ = toy(ALL, 100, seed=7)
    latents = learner.encode(x)
    classes, confidences = learner.predict(latents)
    assert set(classes.tolist()) <= set(BASE)
    assert learner.known_classes == BASE
    assert classes.dtype == np.int64
    assert confidences.dtype == np.float32
    assert ((confidences > 0) & (confidences <= 1)).all()
    _teach(learner, (3,))
    assert learner.known_classes == (0, 1, 3)
    assert set(learner.predict(latents)[0].tolist()) == {0, 1, 3}


def test_confidence_is_the_softmax_over_known_classes(bundle):
    learner = _learner(bundle)
    latents = learner.encode(toy(BASE, 20)[0])
    logits = learner.engine.logits(latents)[:, list(BASE)].astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    classes, confidences = learner.predict(latents)
    assert np.array_equal(classes, shares.argmax(axis=1))
    assert np.allclose(confidences, shares.max(axis=1), atol=1e-6)


def test_predicting_nothing_gives_nothing(bundle):
    classes, confidences = _learner(bundle).predict(np.zeros((0, LATENT), np.float32))
    assert len(classes) == len(confidences) == 0


GOOD = np.zeros(SHAPE, np.float32)


@pytest.mark.parametrize(
    ("x", "label"),
    [
        (np.zeros((3, 2), np.float32), 0),
        (np.zeros(6, np.float32), 0),
        (np.zeros((1, *SHAPE), np.float32), 0),
        (np.zeros((), np.float32), None),
        (GOOD.astype(np.float64), 0),
        (GOOD.astype(np.uint8), None),
        (np.full(SHAPE, np.nan, np.float32), 0),
        (np.where(np.eye(2, 3) > 0, np.float32("inf"), GOOD), None),
        (GOOD, -1),
        (GOOD, CAPACITY),
        (GOOD, 2**70),
        (GOOD, -(2**70)),
        (GOOD, True),
        (GOOD, 1.5),
        (GOOD, float("nan")),
        (GOOD, "1"),
    ],
    ids=lambda value: getattr(value, "shape", value),
)
def test_bad_samples_are_refused(bundle, x, label):
    with pytest.raises(SampleError):
        _learner(bundle).check(x, label)


@pytest.mark.parametrize("label", [None, 0, CAPACITY - 1, np.int64(2)])
def test_good_samples_pass(bundle, label):
    _learner(bundle).check(GOOD, label)


def test_snapshot_and_restore_are_exact(bundle):
    learner = _learner(bundle)
    _teach(learner, (2,))
    kept = learner.snapshot()
    counts = learner.anchor_counts()
    flat = _flat(kept)
    _teach(learner, (3,), seed=51)
    assert _flat(kept) == flat, "a snapshot is a copy"
    learner.restore(kept)
    assert _flat(learner.snapshot()) == flat
    assert learner.anchor_counts() == counts
    fresh = _learner(bundle)
    fresh.restore(kept)
    assert _flat(fresh.snapshot()) == flat
    assert fresh.anchor_counts() == counts


def test_a_snapshot_of_another_engine_keeps_all_but_the_moments(bundle):
    learner = _learner(bundle)
    _teach(learner, (2,))
    kept = learner.snapshot()
    foreign = kept._replace(engine=EngineState(kept.engine.theta, b"of another engine"))
    fresh = _learner(bundle)
    fresh.restore(foreign)
    assert np.array_equal(fresh.engine.theta, learner.engine.theta)
    assert _flat(fresh.snapshot())[2:] == _flat(kept)[2:]


def test_carry_over_keeps_memory_and_classes_but_not_theta(bundle):
    learner = _learner(bundle)
    _teach(learner, (2,))
    fresh = _learner(bundle)
    kept = learner.snapshot()
    fresh.carry_over(kept.buffer, kept.known)
    assert fresh.known_classes == (0, 1, 2)
    assert np.array_equal(fresh.engine.theta, base_theta())
    assert np.array_equal(fresh.buffer.state().labels, learner.buffer.state().labels)


def test_the_same_seed_gives_the_same_theta(bundle):
    one, two, other = (_learner(bundle, seed=seed) for seed in (3, 3, 4))
    for learner in (one, two, other):
        _teach(learner, (2,))
    assert _flat(one.snapshot()) == _flat(two.snapshot())
    assert _flat(one.snapshot()) != _flat(other.snapshot())


def test_steps_and_batch_sizes_are_the_manifest_s(bundle):
    sizes = []

    class Counting(FakeEngine):
        def step(self, batch):
            sizes.append(len(batch.labels))
            return super().step(batch)

    settings = replace(LEARNER, steps_per_batch=3, batch_replay=5)
    learner = _learner(bundle, engine=Counting, learner=settings)
    x, y = toy((2,), 4)
    learner.learn(learner.encode(x), y)
    assert sizes == [9, 9, 9]
    assert learner.steps == 3
    assert learner.buffer.class_counts[2] == 4


def test_a_refused_step_leaves_nothing_behind(bundle):
    learner = _learner(bundle, engine=Failing)
    before, known = _flat(learner.snapshot()), learner.known_classes
    x, y = toy((3,), 4)
    with pytest.raises(EngineError):
        learner.learn(learner.encode(x), y)
    assert learner.known_classes == known, "a class that was not learned may not be predicted"
    assert _flat(learner.snapshot()) == before


def test_a_step_refused_half_way_keeps_the_steps_before_it_and_nothing_else(bundle):
    learner = _learner(bundle, engine=Failing)
    before = learner.snapshot()
    learner.engine.after = 2
    x, y = toy((3,), 4)
    with pytest.raises(EngineError):
        learner.learn(learner.encode(x), y)
    assert learner.steps == 2
    assert learner.known_classes == BASE
    assert np.array_equal(learner.buffer.state().labels, before.buffer.labels)


def test_anchors_are_counted_by_group(bundle):
    learner = _learner(bundle)
    counts = learner.anchor_counts()
    assert list(counts) == ["base", "experience-1", "experience-2"]
    assert [c.n for c in counts.values()] == [60, 30, 30]
    assert counts["experience-1"] == Counts(0, 30), "an unknown class cannot be right"
    empty = Anchors(np.zeros((0, LATENT), np.float32), np.zeros(0, np.int64))
    learner = Learner(learner.engine, bundle.manifest, anchors=empty, buffer=learner.buffer)
    assert set(learner.anchor_counts().values()) == {Counts(0, 0)}


def test_measuring_changes_nothing(bundle):
    learner = _learner(bundle)
    before = _flat(learner.snapshot())
    learner.anchor_counts()
    learner.predict(learner.encode(toy(ALL, 10)[0]))
    assert _flat(learner.snapshot()) == before
