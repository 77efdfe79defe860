"""Packing: the bundle opens, holds what a device needs, and is not left behind when it is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge_ll.bundle import BACKBONE, RECIPE, STEP, TAIL, THETA, Bundle
from edge_ll.config import load
from edge_ll.engine.load import open_engine
from edge_ll.errors import ExportError, TrustError
from edge_ll.trust import Signer, TrustStore
from tests.tiny_bundle import SIGNER, TRUST, Graph

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

LABELS = ("zero", "one", "two", "three", "spare")


def _recipe(**learner):
    from edge_ll_export.recipe import Backbone, Classes, Recipe, Tail

    recipe = load(Path(__file__).parents[2] / "export" / "recipes" / "digits.toml", Recipe)
    return replace(
        recipe,
        classes=Classes(base=(0, 1), experiences=((2,), (3,)), capacity=5, labels=LABELS),
        student=replace(
            recipe.student,
            backbone=Backbone(kind="conv", channels=(3, 4), latent_channels=2),
            tail=Tail(kind="linear"),
        ),
        learner=replace(recipe.learner, **learner),
    )


def _trained(**learner):
    """An untrained student on made-up images: packing asks for no accuracy."""
    from edge_ll_export.data import Dataset, input_spec, split_dataset
    from edge_ll_export.models import build_student
    from edge_ll_export.pipeline import Metrics, Trained

    recipe = _recipe(**learner)
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 60)
    x = rng.integers(0, 8, (240, 1, 8, 8)) + 2 * y[:, None, None, None]
    dataset = Dataset(x.astype(np.uint8), y, np.zeros(240, np.int64), ("all",), input_spec(recipe))
    shares = {"test": 0.1, "anchors": 0.2, "holdout": 0.1, "traffic": 0.1}
    split = split_dataset(dataset, base=(0, 1), new=(2, 3), shares=shares, seed=0)
    student = build_student(recipe).eval()
    return Trained(recipe, dataset, split, student, Metrics(0.9, 0.8, 0.7, 1.0))


SMALL = {"buffer_entries": 20}
PLAIN = {"optimizer": "sgd", "momentum": 0.9, "buffer_entries": 20}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    from edge_ll_export.pack import export_bundle

    path, stages = tmp_path_factory.mktemp("pack") / "digits.bundle", []
    trained = _trained(**SMALL)
    _, parities = export_bundle(trained, path, SIGNER, version=7, on_stage=stages.append)
    return trained, path, stages, parities


@pytest.fixture(scope="module")
def bundle(packed) -> Bundle:
    return Bundle.open(packed[1], TRUST)


def test_every_engine_was_held_against_torch(packed):
    _, path, stages, parities = packed
    assert [parity.engine for parity in parities] == ["step-graph", "ort-training"]
    assert all(parity.ok for parity in parities)
    assert stages[0] == "backbone"
    assert stages[-1] == "parity with torch"
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_the_manifest_says_what_the_recipe_says(packed, bundle):
    manifest = bundle.manifest
    assert (manifest.name, manifest.version) == ("digits", 7)
    assert (manifest.input.shape, manifest.input.dtype) == ((1, 8, 8), "uint8")
    assert manifest.latent.shape == packed[0].student.latent_shape
    assert manifest.labels == LABELS
    assert manifest.base_classes == manifest.known_classes == (0, 1)
    groups = {"base": (0, 1), "experience-1": (2,), "experience-2": (3,)}
    assert manifest.anchor_groups == groups
    assert manifest.engines == ("step-graph", "ort-training")
    assert manifest.learner.learning_rate == packed[0].recipe.learner.lr
    assert manifest.learner.buffer_entries == 20
    assert manifest.drift.average_run_length == packed[0].recipe.drift.average_run_length
    assert manifest.provenance.metrics["student_acc"] == 0.8
    assert {"edge-ll", "torch", "onnx", "python"} <= set(manifest.provenance.versions)
    assert {BACKBONE, TAIL, STEP, THETA, RECIPE} <= set(manifest.files)


def test_the_arrays_are_those_a_device_needs(packed, bundle):
    trained = packed[0]
    split, y = trained.split, trained.dataset.y
    shape = bundle.manifest.latent.shape
    anchors = bundle.array("anchor_latents")
    assert (anchors.dtype, anchors.shape) == (np.int8, (len(split.anchors), *shape))
    assert np.array_equal(bundle.array("anchor_labels"), y[split.anchors])
    assert set(bundle.array("anchor_labels")) == {0, 1, 2, 3}
    labels = bundle.array("exemplar_labels")
    assert np.bincount(labels).tolist() == [10, 10]
    assert bundle.array("exemplar_latents").shape == (20, *shape)
    novelty = bundle.novelty()
    assert novelty.class_means.shape[0] == 2
    assert (np.diff(novelty.scores) >= 0).all()
    assert np.isfinite(novelty.scores).all()
    assert novelty.center.dtype == novelty.projection.dtype == np.float32


def test_what_is_quantised_is_close_to_torch_s_latents(packed, bundle):
    from edge_ll.quantize import LatentQuantizer

    trained = packed[0]
    quantizer = LatentQuantizer(bundle.array("latent_scale"), bundle.array("latent_zero"))
    x = trained.dataset.x[trained.split.anchors]
    with torch.no_grad():
        expected = trained.student.backbone(torch.from_numpy(x)).numpy()
    got = quantizer.decode(bundle.array("anchor_latents"))
    known = np.isin(bundle.array("anchor_labels"), (0, 1))
    assert (np.abs(got - expected)[known] <= quantizer.scale * 0.51 + 1e-6).mean() > 0.98
    assert np.abs(open_engine(bundle).latents(x) - expected).max() < 1e-4


def test_the_device_takes_it(bundle, packed):
    from edge_ll_device.config import LearningConfig
    from edge_ll_device.source import Sample
    from edge_ll_device.student import Student

    student = Student(bundle, open_engine(bundle), LearningConfig())
    trained = packed[0]
    rows = trained.split.stream[:16]
    student.take([Sample(trained.dataset.x[i], int(trained.dataset.y[i]), 1) for i in rows])
    assert student.tally.learned == 16
    assert student.learner.anchor_counts()["base"].n == 24


def test_the_recipe_in_it_rebuilds_the_tail(packed, bundle):
    from edge_ll_export.parity import tail_of

    for (name, got), (_, expected) in zip(
        tail_of(bundle).named_parameters(),
        packed[0].student.tail.named_parameters(),
        strict=True,
    ):
        assert torch.equal(got, expected), name


def test_only_its_signer_is_trusted(packed):
    with pytest.raises(TrustError):
        Bundle.open(packed[1], TrustStore([Signer.generate().public_key]))


@pytest.mark.parametrize(
    ("entries", "size_bytes", "expected"),
    [(200, 1 << 20, 200), (200, 40 * 10, 10), (5, 40 * 10, 5), (200, 39, 0)],
)
def test_the_buffer_keeps_both_of_its_limits(entries, size_bytes, expected):
    from edge_ll_export.pack import learner_defaults

    recipe = _recipe(buffer_entries=entries, buffer_bytes=size_bytes)
    assert learner_defaults(recipe, (32,)).buffer_entries == expected


def test_no_more_exemplars_are_shipped_than_the_buffer_holds():
    from edge_ll_export.pack import _exemplars, learner_defaults

    trained = _trained(buffer_entries=60, buffer_bytes=40 * 10)
    limit = learner_defaults(trained.recipe, trained.student.latent_shape).buffer_entries
    assert len(_exemplars(trained)) <= limit


def _zero_backbone() -> bytes:
    g = Graph()
    flat = g.op("Flatten", g.op("Cast", "x", to=1), axis=1)
    part = g.op("Slice", flat, g.const([0], "int64"), g.const([32], "int64"), g.const([1], "int64"))
    g.op("Mul", part, g.const(0.0), out="latents")
    return g.model({"x": ("uint8", ("batch", 1, 8, 8))}, {"latents": ("float32", ("batch", 32))})


# Name -> (what of the export is replaced, by what; the recipe's learner; part of the reason)
BROKEN = {
    "backbone": ({"export_backbone": _zero_backbone}, SMALL, "backbone"),
    "another optimizer": ({}, PLAIN, "θ"),
    "theta": ({"flatten_theta": lambda: torch.full((165,), 0.01)}, SMALL, "logits"),
}


@pytest.fixture
def exported(monkeypatch, bundle):
    """The graphs of the good bundle, an adamw step graph among them, in place of new exports."""
    from edge_ll_export import pack

    def put(**replaced):
        made = {
            "export_backbone": bundle.read(BACKBONE),
            "export_tail": bundle.read(TAIL),
            "export_step_graphs": {STEP: bundle.read(STEP)},
            **replaced,
        }
        for name, value in made.items():
            monkeypatch.setattr(pack, name, lambda *_, value=value: value)
        monkeypatch.setattr(pack, "why_not", lambda _: "not wanted here")

    return put


@pytest.mark.parametrize(("broken", "learner", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_bundle_that_disagrees_with_torch_fails_and_leaves_no_signed_file(
    tmp_path, exported, broken, learner, reason
):
    from edge_ll_export.pack import export_bundle

    exported(**{name: make() for name, make in broken.items()})
    with pytest.raises(ExportError, match=reason):
        export_bundle(_trained(**learner), tmp_path / "broken.bundle", SIGNER)
    assert list(tmp_path.iterdir()) == [], "a bundle that failed must not lie there, signed"


def test_an_older_good_bundle_survives_a_failed_export(tmp_path, exported):
    from edge_ll_export.pack import export_bundle

    path = tmp_path / "digits.bundle"
    exported()
    export_bundle(_trained(**SMALL), path, SIGNER)
    before = path.read_bytes()
    with pytest.raises(ExportError):
        export_bundle(_trained(**PLAIN), path, SIGNER)
    assert path.read_bytes() == before


def test_momentum_leaves_one_engine(tmp_path):
    from edge_ll_export.pack import export_bundle

    bundle, parities = export_bundle(_trained(**PLAIN), tmp_path / "b", SIGNER)
    assert bundle.manifest.engines == ("step-graph",)
    assert [parity.engine for parity in parities] == ["step-graph"]
    assert not any(name.startswith("ort_training/") for name in bundle.manifest.files)
