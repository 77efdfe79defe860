"""What every execution provider promises: the numbers of the CPU, and the truth about what runs.

A provider that is not in the installed build is skipped. Where EDGE_LL_PROVIDER names one, it has
to be there.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edge_ll.bundle import BACKBONE, Bundle
from edge_ll.engine import MASKED, Batch, Engine
from edge_ll.engine.fake import FakeEngine
from edge_ll.engine.load import open_engine
from edge_ll.engine.providers import PROVIDERS
from edge_ll.errors import EngineError
from tests.tiny_bundle import (
    CAPACITY,
    LATENT,
    LEARNER,
    SHAPE,
    TAILS,
    TRUST,
    Graph,
    base_theta,
    write_tiny_bundle,
    write_torch_bundle,
)

ort = pytest.importorskip("onnxruntime")

STEPS, TOLERANCE = 30, 1e-5


@pytest.fixture(params=PROVIDERS)
def provider(request) -> str:
    name: str = request.param
    if PROVIDERS[name].ort_name not in ort.get_available_providers():
        reason = f"{name} is not in onnxruntime {ort.__version__}"
        if os.environ.get("EDGE_LL_PROVIDER") == name:
            pytest.fail(f"{reason}, but EDGE_LL_PROVIDER asks for it")
        pytest.skip(reason)
    if name == "cuda" and not Path("/dev/nvidia0").exists():
        pytest.skip("this machine has no NVIDIA GPU")
    return name


def _conv_backbone() -> bytes:
    """A pointwise convolution over SHAPE, then ReLU."""
    g = Graph()
    weight = np.random.default_rng(5).standard_normal((2, 2, 1))
    g.op("Flatten", g.op("Relu", g.op("Conv", "x", g.const(weight))), out="latents", axis=1)
    return g.model(
        {"x": ("float32", ("batch", *SHAPE))}, {"latents": ("float32", ("batch", LATENT))}
    )


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return write_tiny_bundle(tmp_path / "toy.bundle", files={BACKBONE: _conv_backbone()})


def _student(kind: str, folder: Path) -> Bundle:
    """A bundle with a tail that torch exported, made here or beforehand."""
    made = os.environ.get("EDGE_LL_STUDENTS")
    if made:
        return Bundle.open(Path(made) / f"{kind}.bundle", TRUST)
    if find_spec("torch") is None:
        pytest.skip("no torch to export a tail with, and EDGE_LL_STUDENTS names no folder")
    return write_torch_bundle(folder / f"{kind}.bundle", kind)


def _batch(rng: np.random.Generator, n: int, shape: tuple[int, ...] = (LATENT,)) -> Batch:
    """Every term of the loss in use, the last class masked."""
    mask = np.zeros((n, CAPACITY), np.float32)
    mask[:, -1] = MASKED
    return Batch(
        latents=rng.standard_normal((n, *shape)).astype(np.float32),
        labels=rng.integers(0, CAPACITY - 1, n),
        ce_weight=rng.random(n).astype(np.float32),
        class_mask=mask,
        target_logits=rng.standard_normal((n, CAPACITY)).astype(np.float32),
        target_weight=rng.random(n).astype(np.float32),
    )


def _side_by_side(engine: Engine, other: Engine, shape: tuple[int, ...] = (LATENT,)) -> None:
    """Both learn the same batches, of changing sizes, and stay together."""
    rng = np.random.default_rng(0)
    for i in range(STEPS):
        batch = _batch(rng, 1 + 7 * i % 31, shape)
        assert engine.step(batch) == pytest.approx(other.step(batch), rel=TOLERANCE, abs=TOLERANCE)
        assert np.abs(engine.theta - other.theta).max() < TOLERANCE
    latents = rng.standard_normal((20, *shape)).astype(np.float32)
    assert np.abs(engine.logits(latents) - other.logits(latents)).max() < 10 * TOLERANCE


def test_it_is_the_one_that_runs_and_says_so(bundle, provider):
    info = open_engine(bundle, providers=(provider,)).info
    chosen = PROVIDERS[provider].ort_name
    assert info.provider == chosen
    assert [where.graph for where in info.placements] == ["backbone", "tail", "step"]
    counts = hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")
    for where in info.placements:
        assert where.provider == chosen
        if counts:
            assert 0 < where.placed <= where.nodes
            assert provider != "cpu" or where.placed == where.nodes
        else:
            assert (where.nodes, where.placed) == (None, None)


def test_it_is_taken_before_the_cpu(bundle, provider):
    info = open_engine(bundle, providers=(provider, "cpu")).info
    assert info.provider == PROVIDERS[provider].ort_name


def test_a_linear_tail_learns_as_in_numpy(bundle, provider):
    reference = FakeEngine(LATENT, CAPACITY, LEARNER)
    reference.set_theta(base_theta())
    _side_by_side(open_engine(bundle, providers=(provider,)), reference)


@pytest.mark.parametrize("kind", TAILS)
def test_tails_of_torch_learn_as_on_the_cpu(kind, provider, tmp_path):
    student = _student(kind, tmp_path)
    engine = open_engine(student, providers=(provider,), threads=2)
    _side_by_side(engine, open_engine(student), student.manifest.latent.shape)


def test_a_convolution_gives_the_latents_of_the_cpu(bundle, provider):
    engine, cpu = open_engine(bundle, providers=(provider,)), open_engine(bundle)
    rng = np.random.default_rng(1)
    for n in (1, 8, 3, 64):
        x = rng.standard_normal((n, *SHAPE)).astype(np.float32)
        assert np.abs(engine.latents(x) - cpu.latents(x)).max() < TOLERANCE


def test_a_state_is_brought_back_exactly(bundle, provider):
    engine = open_engine(bundle, providers=(provider,))
    rng = np.random.default_rng(2)
    engine.step(_batch(rng, 12))
    kept, batch = engine.state(), _batch(rng, 12)
    loss, ahead = engine.step(batch), engine.theta
    engine.restore(kept)
    assert engine.step(batch) == pytest.approx(loss, rel=1e-6)
    assert np.abs(engine.theta - ahead).max() < 1e-6


def test_a_step_that_is_not_finite_changes_nothing(bundle, provider):
    engine = open_engine(bundle, providers=(provider,))
    good = _batch(np.random.default_rng(3), 6)
    engine.step(good)
    before = engine.state()
    with pytest.raises(EngineError, match="finite"):
        engine.step(good._replace(latents=np.full_like(good.latents, np.nan)))
    after = engine.state()
    assert np.array_equal(after.theta, before.theta)
    assert after.optimizer == before.optimizer
    assert np.isfinite(engine.step(good))
