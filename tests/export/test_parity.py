"""Every engine computes what torch computes, and one that does not is found out."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from edge_ll.bundle import RECIPE, STEP, TAIL
from edge_ll.config import load
from edge_ll.errors import BundleError, EngineError, ExportError
from edge_ll.manifest import LossTerms
from tests.conftest import skip_unless_ci
from tests.tiny_bundle import (
    CAPACITY,
    LATENT,
    LEARNER,
    TAILS,
    step_graph,
    tail_graph,
    torch_tail,
    write_tiny_bundle,
    write_torch_bundle,
)

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

EVERY_TERM = {
    "mse": LossTerms(anchor=True, projection=True),
    "kl": LossTerms(target="kl", temperature=3.0, anchor=True, projection=True),
}


def _check(bundle, kind="linear", engine="step-graph", **arguments):
    from edge_ll_export.parity import check_parity

    return check_parity(bundle, engine, torch_tail(kind), **arguments)


def _needs_onnxruntime_training() -> None:
    from edge_ll.engine.ort_training import is_available

    if not is_available():
        skip_unless_ci("onnxruntime-training is not installed")


# At the learning rate of the recipes: AdamW turns a rounding error into a step, where a gradient is
# nearly zero, and a step of the toy problem's rate is beyond any tolerance.
CALM = replace(LEARNER, learning_rate=2e-3)
LEARNERS = {
    "adamw": CALM,
    "sgd": replace(CALM, optimizer="sgd", momentum=0.9),
    "decay and clip": replace(CALM, weight_decay=0.3, clip_norm=0.05),
}
# onnxruntime-training's SGD has no momentum and no decay.
TRAINING_LEARNERS = {
    "adamw": CALM,
    "sgd": replace(CALM, optimizer="sgd", momentum=0.0, weight_decay=0.0),
}


@pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS)
@pytest.mark.parametrize("kind", TAILS)
def test_the_step_graph_is_torch(tmp_path, kind, learner):
    from edge_ll_export.parity import TOLERANCE, require_parity

    parity = _check(write_torch_bundle(tmp_path / "b", kind, learner), kind)
    assert (parity.engine, parity.steps) == ("step-graph", 100)
    gaps = (parity.logits, parity.losses, parity.gradients, parity.theta)
    assert max(gap.absolute for gap in gaps) <= TOLERANCE
    require_parity(parity)


@pytest.mark.ort_training
@pytest.mark.parametrize("learner", TRAINING_LEARNERS.values(), ids=TRAINING_LEARNERS)
@pytest.mark.parametrize("kind", TAILS)
def test_onnxruntime_training_is_torch(tmp_path, kind, learner):
    from edge_ll_export.parity import require_parity

    _needs_onnxruntime_training()
    bundle = write_torch_bundle(tmp_path / "b", kind, learner, artifacts=True)
    parity = _check(bundle, kind, "ort-training")
    assert (parity.engine, parity.provider) == ("ort-training", "CPUExecutionProvider")
    require_parity(parity)


@pytest.mark.ort_training
@pytest.mark.parametrize("terms", EVERY_TERM.values(), ids=EVERY_TERM)
@pytest.mark.parametrize("engine", ["step-graph", "ort-training"])
def test_every_term_of_the_loss_is_torch(tmp_path, engine, terms):
    from edge_ll_export.parity import require_parity

    _needs_onnxruntime_training()
    learner = replace(CALM, loss=terms)
    bundle = write_torch_bundle(tmp_path / "b", "linear", learner, artifacts=True)
    require_parity(_check(bundle, "linear", engine))


def test_torch_s_tail_is_left_as_it_was(tmp_path):
    from edge_ll_export.parity import check_parity
    from edge_ll_export.tail_loss import flatten_theta

    tail = torch_tail("linear")
    before = flatten_theta(tail)
    check_parity(write_torch_bundle(tmp_path / "b", "linear"), "step-graph", tail, steps=2)
    assert torch.equal(flatten_theta(tail), before)


def _perturbed() -> np.ndarray:
    from edge_ll_export.tail_loss import flatten_theta

    theta = flatten_theta(torch_tail("linear")).numpy().copy()
    theta[3] += 1e-3
    return theta


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (lambda: {"theta": _perturbed()}, "logits"),
        (lambda: {"files": {STEP: step_graph(beta2=0.99)}}, "early"),
        (lambda: {"files": {STEP: step_graph("sgd")}}, "theta"),
        (lambda: {"files": {TAIL: _shifted_tail()}}, "logits"),
    ],
    ids=["theta", "optimizer constant", "another optimizer", "tail graph"],
)
def test_what_differs_from_torch_is_found(tmp_path, changes, field):
    from edge_ll_export.parity import TOLERANCE, require_parity

    parity = _check(write_torch_bundle(tmp_path / "b", "linear", **changes()))
    assert getattr(parity, field).absolute > TOLERANCE
    assert not parity.ok
    with pytest.raises(ExportError, match=r"step-graph on onnxruntime .* differs from torch"):
        require_parity(parity)


@pytest.mark.parametrize("rate", [3e-2, 2e-3, 1e-3])
def test_an_optimizer_constant_is_found_at_the_learning_rates_of_recipes(tmp_path, rate):
    """θ moves by ``steps * rate`` at most, so what is allowed must be a share of that."""
    learner = replace(LEARNER, learning_rate=rate)
    right = write_torch_bundle(tmp_path / "right", "linear", learner)
    assert _check(right).ok
    files = {STEP: step_graph(beta2=0.99)}
    assert not _check(write_torch_bundle(tmp_path / "wrong", "linear", learner, files=files)).ok


def _shifted_tail() -> bytes:
    """Logits that are off by a little."""
    from tests.tiny_bundle import Graph, _linear

    g = Graph()
    g.op("Add", _linear(g, CAPACITY), g.const(1e-3), out="logits")
    size = CAPACITY * (LATENT + 1)
    return g.model(
        {"latents": ("float32", ("batch", LATENT)), "theta": ("float32", (size,))},
        {"logits": ("float32", ("batch", CAPACITY))},
    )


@pytest.mark.parametrize("field", ["logits", "losses", "gradients", "early", "theta"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1.1e-4])
def test_no_difference_too_large_or_not_a_number_passes(field, value):
    from edge_ll_export.parity import Gap, Parity, require_parity

    gaps = dict.fromkeys(("logits", "losses", "gradients", "early", "theta"), Gap())
    gaps[field] = Gap(value, value)
    parity = Parity(engine="e", runtime="r", provider="p", steps=10, **gaps)
    assert not parity.ok
    with pytest.raises(ExportError):
        require_parity(parity)


def test_a_small_gradient_counts_as_much_as_a_large_one():
    """Each parameter's gradient is held against its own size, however small that is."""
    from edge_ll_export.parity import Gap, Parity

    gaps = dict.fromkeys(("logits", "losses", "early", "theta"), Gap())
    wrong = Gap(5e-5, 1.0)  # a block of gradients of 5e-5 that came out as zero
    parity = Parity(engine="e", runtime="r", provider="p", steps=10, gradients=wrong, **gaps)
    assert not parity.ok


def test_large_values_may_differ_by_a_small_share():
    """A difference counts against the tensor's largest value where that is above one."""
    from edge_ll_export.parity import Gap, Parity

    gaps = dict.fromkeys(("losses", "gradients", "early", "theta"), Gap())
    for relative, ok in ((1e-6, True), (2e-4, False)):
        logits = Gap(1e-3, relative)
        parity = Parity(engine="e", runtime="r", provider="p", steps=10, logits=logits, **gaps)
        assert parity.ok is ok


def test_a_loss_that_is_not_a_number_is_a_difference(tmp_path, monkeypatch):
    from edge_ll.engine import step_graph as module

    bundle = write_torch_bundle(tmp_path / "b", "linear")
    real = module.StepGraphEngine.step

    def step(engine, batch, reference):
        real(engine, batch, reference)
        return math.nan

    monkeypatch.setattr(module.StepGraphEngine, "step", step)
    assert not _check(bundle).ok


def test_an_engine_that_cannot_run_here_is_an_engine_error(tmp_path):
    with pytest.raises(EngineError):
        _check(write_torch_bundle(tmp_path / "b", "linear"), engine="ort-training")


# The tail from the recipe in the bundle


def _recipe(*, hidden: tuple[int, ...] = (), capacity: int = CAPACITY) -> bytes:
    from edge_ll_export.recipe import Classes, Recipe, Tail

    recipe = load(Path(__file__).parents[2] / "export" / "recipes" / "digits.toml", Recipe)
    classes = Classes(
        base=(0, 1),
        experiences=((2,), (3,)),
        capacity=capacity,
        labels=tuple(str(i) for i in range(capacity)),
    )
    tail = Tail(kind="mlp" if hidden else "linear", hidden=hidden)
    student = replace(recipe.student, tail=tail)
    return msgspec.json.encode(replace(recipe, classes=classes, student=student))


def test_the_recipe_rebuilds_the_tail_with_the_bundle_s_theta(tmp_path):
    from edge_ll_export.parity import check_parity, require_parity, tail_of
    from edge_ll_export.tail_loss import flatten_theta

    theta = np.random.default_rng(0).standard_normal(CAPACITY * (LATENT + 1)).astype(np.float32)
    bundle = write_tiny_bundle(tmp_path / "b", theta=theta, files={RECIPE: _recipe()})
    tail = tail_of(bundle)
    assert np.array_equal(flatten_theta(tail).numpy(), theta)
    require_parity(check_parity(bundle, "step-graph", tail))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (None, "holds no 'recipe.json'"),
        (b"not json", r"recipe\.json"),
        (b"{}", r"recipe\.json"),
        (_recipe(hidden=(5,)), "other parameters"),
        (_recipe(capacity=5), "other parameters"),
    ],
    ids=["absent", "no json", "empty", "another tail", "another capacity"],
)
def test_a_recipe_that_does_not_fit_is_refused(tmp_path, recipe, message):
    from edge_ll_export.parity import tail_of

    files = {} if recipe is None else {RECIPE: recipe}
    with pytest.raises(BundleError, match=message):
        tail_of(write_tiny_bundle(tmp_path / "b", files={**files, TAIL: tail_graph()}))
