"""From the user's own file to a bundle: windows and texts, each with its backbones."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest

from edge_ll.config import parse
from edge_ll.engine.load import open_engine
from edge_ll.tokenizer import bundle_tokenizer
from edge_ll_export.recipe import Recipe
from tests.tiny_bundle import SIGNER
from tests.tiny_tokenizer import TINY_TOKENIZER

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

RECIPES = Path(__file__).parents[2] / "export" / "recipes"


def _recipe(path: Path, kind: str, shape: list[int], backbone: dict, **changes):
    raw = tomllib.loads((RECIPES / "digits.toml").read_text())
    raw |= {
        "dataset": "file",
        "file": {"path": str(path), "kind": kind, "shape": shape},
        "classes": {"base": [0, 1], "experiences": [[2]], "capacity": 3, "labels": list("abc")},
        "teacher": {"width": 8, "fit": {"epochs": 20, "batch": 16, "lr": 1e-2}},
    }
    raw["student"] |= {
        "backbone": backbone,
        "tail": {"kind": "linear"},
        "fit": {"epochs": 20, "batch": 16, "lr": 1e-2},
    }
    raw["learner"]["buffer_entries"] = 20
    return parse(raw | changes, Recipe, source="recipe")


@pytest.fixture
def windows(tmp_path) -> Path:
    """Waves of three speeds on one of two sensors, in odd units."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(3), 80)
    phase = rng.uniform(0, 6, (240, 1))
    wave = np.sin(np.arange(30) * (0.2 + 0.4 * y[:, None]) + phase) * 1000 + 5000
    x = np.stack([rng.normal(0, 1e-3, wave.shape), wave], axis=2).astype(np.float32)
    np.savez(tmp_path / "windows.npz", x=x, y=y)
    return tmp_path / "windows.npz"


@pytest.mark.parametrize(
    "backbone",
    [
        {"kind": "tcn", "channels": [8, 8, 8], "latent_channels": 8, "pool": True},
        {"kind": "mlp", "channels": [32], "latent_channels": 8},
    ],
    ids=["tcn", "mlp"],
)
def test_windows_are_learned_by_teacher_and_student(windows, backbone):
    from edge_ll_export.pipeline import train

    augment = {"window": {"max_scale": 0.1, "max_noise": 0.05}}
    recipe = _recipe(windows, "window", [30, 2], backbone, augment=augment)
    trained = train(recipe)
    assert trained.metrics.teacher_acc > 0.9
    assert trained.metrics.student_acc > 0.9
    assert trained.student.latent_shape == (8,)
    again = train(recipe)
    for (name, first), second in zip(
        trained.student.state_dict().items(), again.student.state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), name


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """Requests of three kinds, a small tokenizer, and an encoder of the same size."""
    pytest.importorskip("tokenizers")
    from edge_ll_export import pretrained
    from edge_ll_export.data import tokens
    from edge_ll_export.models import backbones, teacher
    from edge_ll_export.models.backbones.minilm import MiniLmBackbone
    from edge_ll_export.models.seeding import seeded

    def small(*, spec, layers=2, pool):
        with seeded(7):
            return MiniLmBackbone(
                spec=spec, layers=layers, pool=pool,
                vocabulary=11, width=12, hidden=16, heads=2, positions=16,
            )  # fmt: skip

    monkeypatch.setitem(backbones.KINDS, "minilm", small)
    monkeypatch.setattr(teacher, "pretrained_minilm", small)
    for module in (pretrained, tokens):
        monkeypatch.setattr(module, "minilm_file", lambda _: TINY_TOKENIZER)
    words = (("play a song", "play song"), ("turn on", "turn light on"), ("turn off", "off"))
    rng = np.random.default_rng(0)
    x = [f"{rng.choice(pair)} {rng.choice(['a', ''])}" for pair in words for _ in range(60)]
    np.savez(tmp_path / "texts.npz", x=np.array(x), y=np.repeat(np.arange(3), 60))
    return tmp_path / "texts.npz"


@pytest.mark.parametrize("pool", [True, False])
def test_texts_become_a_bundle_that_reads(texts, tmp_path, pool):
    from edge_ll_export.pack import export_bundle
    from edge_ll_export.pipeline import train

    recipe = _recipe(texts, "text", [8], {"kind": "minilm", "layers": 1, "pool": pool})
    trained = train(recipe)
    assert trained.metrics.student_acc > 0.9
    assert trained.student.latent_shape == ((12,) if pool else (12, 8))
    assert not any(p.requires_grad for p in trained.student.backbone.parameters())
    if not pool:
        return  # packing is the same
    bundle, parities = export_bundle(trained, tmp_path / "texts.bundle", SIGNER)
    assert all(parity.ok for parity in parities)
    manifest = bundle.manifest
    assert (manifest.input.dtype, manifest.input.shape) == ("int64", (8,))
    assert (manifest.tokenizer.file, manifest.tokenizer.max_length) == ("tokenizer.json", 8)
    assert bundle.read("tokenizer.json") == TINY_TOKENIZER
    engine = open_engine(bundle)
    ids = bundle_tokenizer(bundle)(["play a song", "turn light on"])
    assert engine.logits(engine.latents(ids))[:, :2].argmax(axis=1).tolist() == [0, 1]
