"""What every engine promises: numpy, the step graph on any runtime, onnxruntime-training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge_ll.bundle import BACKBONE, STEP, Bundle
from edge_ll.engine import MASKED, Batch, Engine, EngineState, plain_batch
from edge_ll.engine.fake import FakeEngine
from edge_ll.engine.load import open_engine
from edge_ll.errors import EngineError, MissingExtraError
from edge_ll.manifest import LearnerDefaults, LossTerms
from tests.conftest import skip_unless_ci
from tests.tiny_bundle import (
    CAPACITY,
    LATENT,
    LEARNER,
    SHAPE,
    base_theta,
    batch_of,
    exported_artifacts,
    toy,
    write_tiny_bundle,
)

GENTLE = replace(LEARNER, learning_rate=3e-3)
SIZE = CAPACITY * (LATENT + 1)
NAN = np.float32("nan")

Make = Callable[..., Engine]


def _artifacts(learner: LearnerDefaults) -> dict[str, bytes]:
    if find_spec("torch") is None:
        pytest.skip("the artifacts are exported with torch, which is not installed")
    if find_spec("onnxruntime.training") is None:
        skip_unless_ci("onnxruntime-training is not installed")
    return exported_artifacts("linear", replace(learner, learning_rate=1e-3))


@pytest.fixture(
    params=["fake", "step-graph", pytest.param("ort-training", marks=pytest.mark.ort_training)]
)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Builds the engine at the base classes' θ; equal arguments make equal engines."""

    def build(learner: LearnerDefaults = LEARNER) -> Engine:
        if request.param == "fake":
            engine = FakeEngine(LATENT, CAPACITY, learner)
            engine.set_theta(base_theta())
            return engine
        training = request.param == "ort-training"
        bundle = write_tiny_bundle(
            tmp_path / "toy.bundle",
            learner=learner,
            files=_artifacts(learner) if training else None,
            engines=("step-graph", "ort-training") if training else ("step-graph",),
        )
        return open_engine(bundle, request.param)

    return build


def _toy_batch(n: int = 24, classes: tuple[int, ...] = (0, 1, 2, 3), seed: int = 0) -> Batch:
    return batch_of(*toy(classes, n, seed=seed))


def _mixed_batch(rng: np.random.Generator, n: int) -> Batch:
    """Every term of the loss in use, the last class masked."""
    mask = np.zeros((n, CAPACITY), np.float32)
    mask[:, -1] = MASKED
    return Batch(
        latents=rng.standard_normal((n, LATENT)).astype(np.float32),
        labels=rng.integers(0, CAPACITY - 1, n),
        ce_weight=rng.random(n).astype(np.float32),
        class_mask=mask,
        target_logits=rng.standard_normal((n, CAPACITY)).astype(np.float32),
        target_weight=rng.random(n).astype(np.float32),
    )


def _same(a: EngineState, b: EngineState) -> bool:
    return np.array_equal(a.theta, b.theta) and a.optimizer == b.optimizer


def test_latents_and_logits_have_their_shapes_and_dtypes(make):
    engine = make()
    for n in (1, 2, 17):
        x, _ = toy((0, 1), n)
        latents = engine.latents(x)
        assert (latents.shape, latents.dtype) == ((n, LATENT), np.float32)
        assert np.array_equal(latents, x.reshape(n, -1))
        logits = engine.logits(latents)
        assert (logits.shape, logits.dtype) == ((n, CAPACITY), np.float32)
        weight = base_theta()[: CAPACITY * LATENT].reshape(CAPACITY, LATENT)
        expected = latents @ weight.T + base_theta()[CAPACITY * LATENT :]
        assert np.allclose(logits, expected, atol=1e-4)


def test_it_says_what_runs(make):
    info = make().info
    assert info.name in {"fake", "step-graph", "ort-training"}
    assert info.provider
    assert info.runtime


def test_the_loss_falls_on_a_separable_problem(make):
    engine = make()
    losses = [engine.step(_toy_batch(seed=seed)) for seed in range(80)]
    assert losses[-1] < 0.3 * losses[0]
    x, y = toy((0, 1, 2, 3), 200, seed=99)
    assert (engine.logits(engine.latents(x)).argmax(axis=1) == y).mean() > 0.95


def test_the_loss_is_the_one_before_the_step(make):
    engine, batch = make(), _toy_batch()
    logits = engine.logits(batch.latents).astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -log_p[np.arange(len(log_p)), batch.labels].mean()
    assert engine.step(batch) == pytest.approx(expected, abs=1e-5)


def test_theta_is_a_copy_both_ways(make):
    engine = make()
    engine.theta[:] = 7.0
    assert np.array_equal(engine.theta, base_theta())
    given = base_theta() * np.float32(0.5)
    engine.set_theta(given)
    given[:] = 7.0
    assert np.array_equal(engine.theta, base_theta() * np.float32(0.5))
    state = engine.state()
    state.theta[:] = 7.0
    assert np.array_equal(engine.theta, base_theta() * np.float32(0.5))


def test_theta_given_is_what_predicts_and_what_is_read_back(make):
    engine = make()
    x, _ = toy((0, 1), 5)
    before = engine.logits(engine.latents(x))
    engine.set_theta(np.zeros(SIZE, np.float32))
    assert np.array_equal(engine.logits(engine.latents(x)), np.zeros((5, CAPACITY), np.float32))
    engine.set_theta(base_theta())
    assert np.array_equal(engine.logits(engine.latents(x)), before)


def test_setting_theta_starts_the_optimizer_anew(make):
    engine, fresh = make(), make()
    for seed in range(5):
        engine.step(_toy_batch(seed=seed))
    engine.set_theta(base_theta())
    assert engine.step(_toy_batch(seed=9)) == fresh.step(_toy_batch(seed=9))
    assert np.array_equal(engine.theta, fresh.theta)


@pytest.mark.parametrize(
    "theta",
    [
        np.zeros(SIZE - 1, np.float32),
        np.zeros(SIZE + 1, np.float32),
        np.zeros(0, np.float32),
        np.zeros((1, SIZE), np.float32),
        np.zeros(SIZE, np.float64),
        np.full(SIZE, NAN),
        np.full(SIZE, np.float32("-inf")),
    ],
    ids=["short", "long", "empty", "2-d", "float64", "nan", "inf"],
)
def test_a_wrong_theta_is_refused_and_the_old_one_stays(make, theta):
    engine = make()
    engine.step(_toy_batch())
    before = engine.state()
    with pytest.raises(EngineError, match="θ"):
        engine.set_theta(theta)
    with pytest.raises(EngineError, match="θ"):
        engine.restore(EngineState(theta, before.optimizer))
    assert _same(engine.state(), before)


def test_restore_is_exact_and_so_is_what_follows(make):
    engine = make()
    for seed in range(3):
        engine.step(_toy_batch(seed=seed))
    kept = engine.state()
    onward = [engine.step(_toy_batch(seed=10 + i)) for i in range(3)]
    ahead = engine.state()
    engine.restore(kept)
    assert _same(engine.state(), kept)
    assert [engine.step(_toy_batch(seed=10 + i)) for i in range(3)] == onward
    assert _same(engine.state(), ahead)
    other = make()
    other.restore(kept)
    assert [other.step(_toy_batch(seed=10 + i)) for i in range(3)] == onward
    assert np.array_equal(other.theta, ahead.theta)


def test_a_state_from_before_the_first_step_can_be_restored(make):
    engine = make()
    kept = engine.state()
    first = engine.step(_toy_batch())
    theta = engine.theta
    engine.restore(kept)
    assert np.array_equal(engine.theta, base_theta())
    assert engine.step(_toy_batch()) == first
    assert np.array_equal(engine.theta, theta)


@pytest.mark.parametrize("damage", [b"", b"damaged", bytes(8 + 8 * SIZE - 4), b"\xff" * 1000])
def test_a_damaged_state_is_refused_and_the_old_one_stays(make, damage):
    engine, twin = make(), make()
    for one in (engine, twin):
        one.step(_toy_batch())
    with pytest.raises(EngineError):
        engine.restore(EngineState(np.zeros(SIZE, np.float32), damage))
    assert np.array_equal(engine.theta, twin.theta)
    assert engine.step(_toy_batch(seed=1)) == twin.step(_toy_batch(seed=1))
    assert np.array_equal(engine.theta, twin.theta)


@pytest.mark.ort_training
def test_a_checkpoint_of_another_theta_is_refused_and_changes_nothing(tmp_path):
    learner = LEARNER
    bundle = write_tiny_bundle(
        tmp_path / "b", files=_artifacts(learner), engines=("step-graph", "ort-training")
    )
    engine = open_engine(bundle, "ort-training")
    old = engine.state()
    engine.step(_toy_batch())
    before = engine.state()
    with pytest.raises(EngineError, match="θ"):
        engine.restore(EngineState(before.theta, old.optimizer))
    assert np.array_equal(engine.theta, before.theta)
    assert engine.state().optimizer == before.optimizer


GOOD = _toy_batch(6)
BAD_BATCHES = {
    "nan latents": GOOD._replace(latents=np.full_like(GOOD.latents, NAN)),
    "one nan": GOOD._replace(latents=np.where(np.arange(LATENT) == 2, NAN, GOOD.latents)),
    "inf latents": GOOD._replace(latents=np.full_like(GOOD.latents, np.inf)),
    "nan weight": GOOD._replace(ce_weight=np.full_like(GOOD.ce_weight, NAN)),
    "nan target": GOOD._replace(
        target_logits=np.full_like(GOOD.target_logits, NAN), target_weight=np.ones(6, np.float32)
    ),
    "label past capacity": GOOD._replace(labels=np.full(6, CAPACITY)),
    "label -1": GOOD._replace(labels=np.full(6, -1)),
    "int32 labels": GOOD._replace(labels=GOOD.labels.astype(np.int32)),
    "float64 latents": GOOD._replace(latents=GOOD.latents.astype(np.float64)),
    "narrow latents": GOOD._replace(latents=GOOD.latents[:, :-1]),
    "unflat latents": GOOD._replace(latents=GOOD.latents.reshape(6, *SHAPE)),
    "fewer weights": GOOD._replace(ce_weight=GOOD.ce_weight[:-1]),
    "one weight": GOOD._replace(target_weight=np.zeros(1, np.float32)),
    "one mask for all": GOOD._replace(class_mask=np.zeros(CAPACITY, np.float32)),
    "narrow targets": GOOD._replace(target_logits=GOOD.target_logits[:, 1:]),
    "empty": Batch(*(part[:0] for part in GOOD)),
}


@pytest.mark.parametrize("bad", BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_a_failed_step_changes_nothing_and_the_next_good_one_works(make, bad):
    engine, twin = make(), make()
    for one in (engine, twin):
        one.step(_toy_batch(seed=1))
    before = engine.state()
    for _ in range(2):
        with np.errstate(all="ignore"), pytest.raises(EngineError):
            engine.step(bad)
    assert _same(engine.state(), before)
    assert engine.step(_toy_batch(seed=2)) == twin.step(_toy_batch(seed=2))
    assert np.array_equal(engine.theta, twin.theta)


@pytest.mark.parametrize("scale", [1e10, 1e18, 1e25, 1e37])
def test_huge_but_finite_latents_never_make_theta_infinite(make, scale):
    engine = make()
    before = engine.state()
    batch = GOOD._replace(latents=GOOD.latents * np.float32(scale))
    refused = False
    with np.errstate(all="ignore"):
        try:
            engine.step(batch)
        except EngineError:
            refused = True
    assert np.isfinite(engine.theta).all()
    if refused:
        assert _same(engine.state(), before)
    assert np.isfinite(engine.step(GOOD))


def test_a_learning_rate_that_overflows_is_refused(make):
    engine = make(replace(LEARNER, learning_rate=3e38, weight_decay=0.0))
    refused = 0
    for seed in range(5):
        before = engine.theta
        with np.errstate(all="ignore"):
            try:
                engine.step(_toy_batch(seed=seed))
            except EngineError:
                refused += 1
                assert np.array_equal(engine.theta, before)
        assert np.isfinite(engine.theta).all()
    assert refused


def test_a_batch_of_one(make):
    engine = make()
    losses = [engine.step(_toy_batch(1, (2,))) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert np.isfinite(engine.theta).all()


def test_weights_of_zero_leave_a_finite_theta(make):
    engine = make(replace(LEARNER, weight_decay=0.0))
    batch = GOOD._replace(ce_weight=np.zeros(6, np.float32))
    for _ in range(3):
        assert engine.step(batch) == 0.0
    assert np.allclose(engine.theta, base_theta(), atol=1e-7)
    assert np.isfinite(engine.step(GOOD))
    assert np.isfinite(engine.theta).all()


def test_a_batch_of_a_single_class(make):
    engine = make()
    losses = [engine.step(_toy_batch(8, (1,), seed=seed)) for seed in range(20)]
    assert np.isfinite(losses).all()
    assert np.isfinite(engine.theta).all()


def test_a_masked_class_gets_no_gradient(make):
    engine = make(replace(LEARNER, weight_decay=0.0))
    mask = np.array([0, 0, 0, MASKED], np.float32)
    for seed in range(20):
        x, y = toy((0, 1, 2), 12, seed=seed)
        engine.step(plain_batch(engine.latents(x), y, mask))
    weight = engine.theta[: CAPACITY * LATENT].reshape(CAPACITY, LATENT)
    assert np.abs(weight[3]).max() < 1e-6
    assert abs(engine.theta[-1]) < 1e-6
    assert np.abs(weight[2]).max() > 0.1


def test_target_logits_pull_without_a_label(make):
    engine = make(replace(LEARNER, weight_decay=0.0))
    target = np.full((6, CAPACITY), 3.0, np.float32)
    batch = GOOD._replace(
        ce_weight=np.zeros(6, np.float32), target_logits=target, target_weight=np.ones(6, "f4")
    )
    losses = [engine.step(batch) for _ in range(60)]
    assert losses[0] == pytest.approx(
        float(np.square(make().logits(GOOD.latents) - target).mean()), rel=1e-5
    )
    assert losses[-1] < 0.3 * losses[0]


def test_the_memory_layout_of_a_batch_does_not_matter(make):
    engine, twin = make(), make()
    batch = _mixed_batch(np.random.default_rng(3), 10)
    strided = Batch(*(np.repeat(part, 2, axis=0)[::2] for part in batch))
    turned = strided._replace(
        latents=np.asfortranarray(batch.latents), target_logits=np.asfortranarray(batch[4])
    )
    assert not turned.labels.flags["C_CONTIGUOUS"]
    assert engine.step(turned) == twin.step(batch)
    assert np.array_equal(engine.theta, twin.theta)
    assert np.array_equal(engine.logits(turned.latents), twin.logits(batch.latents))


def test_the_batch_is_not_written_to(make):
    engine = make()
    batch = _mixed_batch(np.random.default_rng(3), 10)
    copies = [part.copy() for part in batch]
    for part in batch:
        part.flags.writeable = False
    engine.step(batch)
    assert all(np.array_equal(a, b) for a, b in zip(batch, copies, strict=True))


def test_all_engines_agree_over_fifty_steps(make):
    engine, reference = make(GENTLE), FakeEngine(LATENT, CAPACITY, GENTLE)
    reference.set_theta(base_theta())
    rng = np.random.default_rng(0)
    for i in range(50):
        batch = _mixed_batch(rng, 1 + i % 9)
        assert engine.step(batch) == pytest.approx(reference.step(batch), rel=1e-5, abs=1e-5)
        assert np.abs(engine.theta - reference.theta).max() < 1e-5
    latents = rng.standard_normal((20, LATENT)).astype(np.float32)
    assert np.abs(engine.logits(latents) - reference.logits(latents)).max() < 1e-4


@pytest.mark.parametrize(
    "x",
    [np.zeros((2, 5), np.float32), np.zeros((2, 2, 4), np.float32), np.zeros((2, 1), np.float32)],
)
def test_inputs_of_a_wrong_shape_are_refused(make, x):
    with pytest.raises(EngineError):
        make().latents(x)


def test_latents_of_a_wrong_shape_are_refused(make):
    with pytest.raises(EngineError):
        make().logits(np.zeros((2, LATENT + 1), np.float32))


def test_sgd_on_the_step_graph_is_momentum_with_coupled_decay(tmp_path):
    learner = replace(LEARNER, optimizer="sgd", momentum=0.9, weight_decay=0.1, clip_norm=1e6)
    engine = open_engine(write_tiny_bundle(tmp_path / "b", learner=learner))
    theta, move = base_theta().astype(np.float64), np.zeros(SIZE)
    batch = _toy_batch()
    for _ in range(5):
        weight = theta[: CAPACITY * LATENT].reshape(CAPACITY, LATENT)
        logits = batch.latents @ weight.T + theta[CAPACITY * LATENT :]
        slope = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        slope[np.arange(len(slope)), batch.labels] -= 1
        slope /= len(slope)
        gradient = np.concatenate([(slope.T @ batch.latents).reshape(-1), slope.sum(axis=0)])
        move = 0.9 * move + gradient + 0.1 * theta
        theta = theta - learner.learning_rate * move
        engine.step(batch)
    assert np.abs(engine.theta - theta).max() < 1e-5


# The gradient, the anchor, the projection

TERMS = {
    "mse": LossTerms(anchor=True, projection=True),
    "kl": LossTerms(target="kl", temperature=3.0, anchor=True, projection=True),
}


def _numeric(theta: np.ndarray, loss: Callable[[np.ndarray], float]) -> np.ndarray:
    """Central differences of a loss by θ, in float64."""
    nudges = 1e-4 * np.eye(len(theta))
    return np.array([(loss(theta + n) - loss(theta - n)) / 2e-4 for n in nudges])


def _loss(theta: np.ndarray, batch: Batch, terms: LossTerms) -> float:
    """The loss by its formulas, in float64."""
    weight = theta[: CAPACITY * LATENT].reshape(CAPACITY, LATENT)
    logits = batch.latents.astype(np.float64) @ weight.T + theta[CAPACITY * LATENT :]

    def log_softmax(z):
        return (
            z
            - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))
            - z.max(1, keepdims=True)
        )

    ce = -log_softmax(logits + batch.class_mask)[np.arange(len(logits)), batch.labels]
    if terms.target == "kl":
        t = terms.temperature
        here = batch.target_logits > MASKED / 2
        wanted = np.exp(log_softmax(batch.target_logits.astype(np.float64) / t))
        got = log_softmax(np.where(here, logits, MASKED) / t)
        apart = np.where(here, wanted * (np.log(np.where(here, wanted, 1)) - got), 0)
        distance = t**2 * apart.sum(1)
    else:
        distance = np.square(logits - batch.target_logits).mean(1)
    return float((batch.ce_weight * ce + batch.target_weight * distance).mean())


def _masked_target(batch: Batch, terms: LossTerms) -> Batch:
    target = batch.target_logits.copy()
    if terms.target == "kl":
        target[:, -1] = MASKED
    return batch._replace(target_logits=target)


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("n", [1, 9])
def test_the_gradient_is_the_loss_s(make, terms, n):
    engine = make(replace(GENTLE, loss=terms))
    rng = np.random.default_rng(4)
    batch = _masked_target(_mixed_batch(rng, n), terms)
    centre = rng.standard_normal(SIZE).astype(np.float32)
    weight = rng.random(SIZE).astype(np.float32)
    engine.set_anchor(centre, weight)

    def loss(theta):
        return _loss(theta, batch, terms) + float((weight * (theta - centre) ** 2).sum())

    before = engine.state()
    gradient = engine.gradient(batch)
    assert (gradient.shape, gradient.dtype) == ((SIZE,), np.float32)
    expected = _numeric(base_theta().astype(np.float64), loss)
    assert np.abs(gradient - expected).max() < 1e-4
    assert _same(engine.state(), before)
    assert engine.step(batch) == pytest.approx(loss(base_theta().astype(np.float64)), rel=1e-5)


def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(make):
    engine, twin = make(), make()
    with np.errstate(all="ignore"), pytest.raises(EngineError):
        engine.gradient(BAD_BATCHES["one nan"])
    assert engine.step(GOOD) == twin.step(GOOD)
    assert np.array_equal(engine.theta, twin.theta)


def test_a_gradient_whose_norm_overflows_is_never_a_silent_zero(make):
    engine = make()
    batch = GOOD._replace(latents=GOOD.latents * np.float32(1e20))
    with np.errstate(all="ignore"):
        try:
            gradient = engine.gradient(batch)
        except EngineError:
            return
    assert np.abs(gradient).max() > 1e15


def test_a_graph_that_lacks_an_input_is_refused_when_it_is_opened(tmp_path):
    learner = replace(LEARNER, loss=TERMS["mse"])
    plain = write_tiny_bundle(tmp_path / "plain").read(STEP)
    bundle = write_tiny_bundle(tmp_path / "b", learner=learner, files={STEP: plain})
    with pytest.raises(EngineError, match="does not fit the manifest"):
        open_engine(bundle)


def test_an_anchor_holds_theta_near_its_centre(make):
    learner = replace(GENTLE, loss=TERMS["mse"], weight_decay=0.0)
    free, held = make(learner), make(learner)
    held.set_anchor(base_theta(), np.full(SIZE, 10.0, np.float32))
    for seed in range(60):
        for engine in (free, held):
            engine.step(_toy_batch(classes=(2, 3), seed=seed))
    moved = [float(np.abs(engine.theta - base_theta()).max()) for engine in (free, held)]
    assert moved[1] < 0.3 * moved[0]


@pytest.mark.parametrize(
    ("centre", "weight"),
    [
        (np.zeros(SIZE - 1, np.float32), np.zeros(SIZE, np.float32)),
        (np.zeros(SIZE, np.float32), np.full(SIZE, NAN)),
        (np.zeros(SIZE, np.float32), np.full(SIZE, -1, np.float32)),
        (np.zeros(SIZE), np.zeros(SIZE, np.float32)),
    ],
    ids=["short", "nan", "negative", "float64"],
)
def test_a_wrong_anchor_is_refused_and_the_old_one_stays(make, centre, weight):
    learner = replace(GENTLE, loss=TERMS["mse"])
    engine, twin = make(learner), make(learner)
    for one in (engine, twin):
        one.set_anchor(np.ones(SIZE, np.float32), np.ones(SIZE, np.float32))
    with pytest.raises(EngineError, match="anchor"):
        engine.set_anchor(centre, weight)
    assert engine.step(GOOD) == twin.step(GOOD)


def test_what_the_loss_was_not_exported_with_is_refused(make):
    engine = make()
    before = engine.state()
    with pytest.raises(EngineError, match=r"learner\.anchor = true"):
        engine.set_anchor(np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32))
    with pytest.raises(EngineError, match=r"learner\.projection = true"):
        engine.step(GOOD, GOOD)
    assert _same(engine.state(), before)


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_a_projected_step_takes_away_what_opposes_the_reference(make, terms):
    learner = replace(GENTLE, loss=terms, clip_norm=1e6)
    engine, reference_engine = make(learner), FakeEngine(LATENT, CAPACITY, learner)
    reference_engine.set_theta(base_theta())
    rng = np.random.default_rng(5)
    anchor = rng.standard_normal(SIZE).astype(np.float32), np.full(SIZE, 1e-3, np.float32)
    for one in (engine, reference_engine):
        one.set_anchor(*anchor)
    opposed = 0
    for i in range(30):
        batch = _masked_target(_mixed_batch(rng, 1 + i % 5), terms)
        other = _masked_target(_mixed_batch(rng, 1 + i % 7), terms)
        if i % 2:  # the same samples, otherwise labelled: the gradients oppose each other
            batch = batch._replace(target_weight=np.zeros_like(batch.target_weight))
            other = batch._replace(labels=(batch.labels + 1) % (CAPACITY - 1))
        opposed += float(engine.gradient(batch) @ engine.gradient(other)) < 0
        expected = reference_engine.step(batch, other)
        assert engine.step(batch, other) == pytest.approx(expected, rel=1e-5)
        assert np.abs(engine.theta - reference_engine.theta).max() < 1e-5
    assert opposed > 3


def test_a_malformed_reference_is_refused_and_changes_nothing(make):
    engine = make(replace(GENTLE, loss=TERMS["mse"]))
    before = engine.state()
    for name in ("empty", "narrow latents", "label past capacity"):
        with pytest.raises(EngineError):
            engine.step(GOOD, BAD_BATCHES[name])
    with np.errstate(all="ignore"), pytest.raises(EngineError):
        engine.step(GOOD, BAD_BATCHES["one nan"])
    assert _same(engine.state(), before)


def test_a_batch_may_be_given_away_at_once(make):
    """The engine keeps no view of a batch: what the caller does with it afterwards is its own."""
    engine, twin = make(), make()
    for seed in range(20):
        batch = _toy_batch(seed=seed)
        strided = batch._replace(latents=np.repeat(batch.latents, 2, axis=0)[::2])
        engine.step(strided)
        strided.latents[:] = NAN
        twin.step(_toy_batch(seed=seed))
    assert np.array_equal(engine.theta, twin.theta)


# Opening


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return write_tiny_bundle(tmp_path / "toy.bundle")


def test_auto_is_the_step_graph(bundle):
    assert open_engine(bundle).info.name == "step-graph"
    assert np.array_equal(open_engine(bundle).theta, base_theta())


def test_an_engine_that_the_bundle_lacks_is_named(bundle):
    with pytest.raises(EngineError, match=r"holds no engine 'ort-training'; it holds: step-graph"):
        open_engine(bundle, "ort-training")


def test_a_runtime_that_cannot_train_says_what_to_install(tmp_path, monkeypatch):
    from edge_ll.engine import ort_training

    monkeypatch.setattr(ort_training, "is_available", lambda: False)
    bundle = write_tiny_bundle(tmp_path / "b", engines=("step-graph", "ort-training"))
    with pytest.raises(EngineError, match=r"pip install .*device-ort-training.*step-graph"):
        open_engine(bundle, "ort-training")


def test_without_a_runtime_the_extra_is_named(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "edge_ll.engine.runtime", None)
    with pytest.raises(MissingExtraError, match=r'pip install "edge-ll\[device\]"'):
        open_engine(bundle)


@pytest.mark.parametrize(
    ("providers", "message"),
    [
        ((), "got none"),
        (("tpu",), "got tpu"),
        (("cpu", "tpu"), "got cpu, tpu"),
    ],
)
def test_unknown_providers_are_refused(bundle, providers, message):
    with pytest.raises(EngineError, match=message):
        open_engine(bundle, providers=providers)


def test_a_provider_that_is_not_here_is_no_silent_fallback(bundle, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match='add "cpu"'):
        open_engine(bundle, providers=("cuda",))
    engine = open_engine(bundle, providers=("cuda", "cpu"), threads=2, spinning=True)
    assert engine.info.provider == "CPUExecutionProvider"


@pytest.mark.parametrize("name", [BACKBONE, STEP])
def test_a_graph_that_the_runtime_refuses_is_named(tmp_path, name):
    from tests.tiny_bundle import Graph

    g = Graph()
    g.op("NoSuchOperator", "x", out="y")
    model = g.model({"x": ("float32", (1,))}, {"y": ("float32", (1,))})
    bundle = write_tiny_bundle(tmp_path / "b", files={name: model})
    with pytest.raises(EngineError, match=rf"{name}: onnxruntime .* refuses it"):
        open_engine(bundle)
