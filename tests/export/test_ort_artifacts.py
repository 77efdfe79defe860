"""The artifacts for onnxruntime-training: four files that 1.19.2 reads, and reasons where not."""

from __future__ import annotations

import contextlib
import os
import sys

import pytest
from msgspec.structs import replace

from edge_ll.errors import ExportError, MissingExtraError
from tests.conftest import skip_unless_ci
from tests.tiny_bundle import LATENT, LEARNER, TAILS, exported_artifacts, torch_tail

pytestmark = [pytest.mark.torch, pytest.mark.ort_training]
pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

SGD = replace(LEARNER, optimizer="sgd", momentum=0.0, weight_decay=0.0)


@pytest.fixture(autouse=True)
def _needs_onnxruntime_training():
    from edge_ll.engine.ort_training import is_available

    if not is_available():
        skip_unless_ci("onnxruntime-training is not installed")


@pytest.mark.parametrize(
    ("learner", "possible"),
    [
        (LEARNER, True),
        (replace(LEARNER, weight_decay=0.0), True),
        (SGD, True),
        (replace(SGD, momentum=0.9), False),
        (replace(SGD, weight_decay=0.1), False),
    ],
)
def test_what_its_optimizers_cannot_do_is_said(learner, possible):
    from edge_ll_export.ort_artifacts import why_not

    reason = why_not(learner)
    assert (reason is None) is possible
    if reason:
        assert "SGD has neither" in reason


@pytest.mark.parametrize("learner", [LEARNER, SGD], ids=["adamw", "sgd"])
def test_there_are_four_files_of_a_readable_version(learner):
    from edge_ll.engine.ort_training import FILES

    files = exported_artifacts("linear", learner)
    assert set(files) == {f"ort_training/{name}" for name in FILES}
    for name, data in files.items():
        if name.endswith(".onnx"):
            assert onnx.load_from_string(data).ir_version <= 10


@pytest.mark.parametrize("kind", TAILS)
def test_they_pass_the_scan_of_a_bundle_and_hold_every_parameter(kind):
    from edge_ll.bundle import _TRAINING_DOMAINS
    from edge_ll.onnx_scan import check_onnx

    files = exported_artifacts(kind, LEARNER)
    for name, data in files.items():
        if name.endswith(".onnx"):
            check_onnx(name, data, domains=_TRAINING_DOMAINS)
    for name, _ in torch_tail(kind).named_parameters():
        assert f"tail.{name}".encode() in files["ort_training/checkpoint"]


def test_the_decay_is_torch_s():
    model = onnx.load_from_string(
        exported_artifacts("linear", LEARNER)["ort_training/optimizer_model.onnx"]
    )
    modes = [
        attribute.i
        for node in model.graph.node
        if node.op_type == "AdamWOptimizer"
        for attribute in node.attribute
        if attribute.name == "adam_mode"
    ]
    assert modes == [0]


def test_standard_error_is_given_back(capfd):
    import logging

    from edge_ll_export.ort_artifacts import _quiet

    level = logging.getLogger().level
    before = os.fstat(2).st_ino
    with contextlib.suppress(RuntimeError), _quiet():
        os.write(2, b"hidden")
        raise RuntimeError
    os.write(2, b"shown")
    assert os.fstat(2).st_ino == before
    assert logging.getLogger().level == level
    assert capfd.readouterr().err == "shown"


def test_without_the_package_the_extra_is_named(monkeypatch):
    from edge_ll_export.ort_artifacts import export_ort_artifacts

    monkeypatch.setitem(sys.modules, "onnxruntime.training", None)
    with pytest.raises(MissingExtraError, match=r'pip install "edge-ll\[export\]"'):
        export_ort_artifacts(torch_tail("linear"), (LATENT,), LEARNER)


def test_a_gradient_that_cannot_be_built_is_an_export_error(monkeypatch):
    from onnxruntime.training import artifacts

    from edge_ll_export import ort_artifacts

    def fail(*_, **__):
        raise RuntimeError("no gradient")

    monkeypatch.setattr(artifacts, "generate_artifacts", fail)
    monkeypatch.setattr(ort_artifacts, "_forward_model", lambda *_: None)
    with pytest.raises(ExportError, match="no gradient"):
        ort_artifacts.export_ort_artifacts(torch_tail("linear"), (LATENT,), LEARNER)
