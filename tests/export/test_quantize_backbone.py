"""The int8 backbone: its form, what stays float32, and when it is shipped."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from functools import cache

import numpy as np
import pytest
from msgspec.structs import replace

from edge_ll.bundle import BACKBONE
from edge_ll.engine.load import open_engine
from edge_ll.errors import ExportError
from edge_ll.metrics import Counts
from edge_ll.quantize import LatentQuantizer
from tests.export.test_graphs import check_portable
from tests.export.test_pack import SMALL, _trained
from tests.tiny_bundle import SIGNER

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

WAVE = 2048


def _images(n: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 17, (n, 1, 8, 8)).astype(np.uint8)


def _waves(n: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(-9000, 9000, (n, WAVE)).astype(np.int16)


def _conv(channels=(6, 8)):
    from edge_ll_export.data import InputSpec
    from edge_ll_export.models.backbones import ConvBackbone

    torch.manual_seed(0)
    spec = InputSpec(shape=(1, 8, 8), dtype="uint8", full_scale=16.0)
    return ConvBackbone(spec=spec, channels=channels, latent_channels=4)


def _dscnn():
    from edge_ll_export.data import InputSpec
    from edge_ll_export.models.backbones import SeparableBackbone

    torch.manual_seed(0)
    spec = InputSpec(shape=(WAVE,), dtype="int16", full_scale=32768.0, sample_rate_hz=8000)
    backbone = SeparableBackbone(spec=spec, channels=(8, 8), latent_channels=4)
    backbone.calibrate(torch.from_numpy(_waves()))
    return backbone


class _Residual(torch.nn.Module):
    """What the recipes' backbones do not have: a sum of branches, pooling, a dense last layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = torch.nn.Conv2d(1, 6, 3, padding=1)
        self.branch = torch.nn.Conv2d(6, 6, 3, padding=1)
        self.dense = torch.nn.Linear(6 * 16, 12)
        self.out = torch.nn.Linear(12, 5)

    def forward(self, x):
        h = torch.relu(self.stem(x.to(torch.float32) / 16))
        h = torch.nn.functional.max_pool2d(torch.relu(h + self.branch(h)), 2)
        return self.out(torch.relu(self.dense(h.flatten(1))))


# Name -> (backbone, samples, how many layers become int8)
BACKBONES = {
    "conv": (_conv, _images, 2),
    "dscnn": (_dscnn, _waves, 4),
    "residual": (_Residual, _images, 3),
}


def _exported(module, x) -> bytes:
    from edge_ll_export.graphs import export_backbone

    return export_backbone(module.eval(), torch.from_numpy(x[:7]))


@cache
def _float32(name: str) -> bytes:
    make, samples, _ = BACKBONES[name]
    return _exported(make(), samples())


@pytest.fixture(scope="module", params=BACKBONES)
def graphs(request):
    """The float32 graph, the int8 graph, samples, and how many layers are int8."""
    from edge_ll_export.quantize_backbone import quantize_backbone

    _, samples, layers = BACKBONES[request.param]
    float32 = _float32(request.param)
    return float32, quantize_backbone(float32, samples()), samples(), layers


def _held(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}


def test_it_runs_wherever_the_float32_graph_runs(graphs):
    float32, int8, x, _ = graphs
    from edge_ll_export.precision import open_encoder

    model = check_portable(int8)
    before, after = onnx.load_from_string(float32).graph, model.graph
    assert list(after.input) == list(before.input)
    assert list(after.output) == list(before.output)
    for n in (1, 5, 64):
        assert open_encoder(int8)(x[:n]).shape == open_encoder(float32)(x[:n]).shape


def test_weights_are_seven_bits_with_a_scale_for_each_channel(graphs):
    _, int8, _, layers = graphs
    model = onnx.load_from_string(int8)
    held = _held(model)
    weights = [
        node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in held
        and held[node.input[0]].dtype == np.int8
    ]
    assert len(weights) == layers
    for node in weights:
        codes, scale, zero = (held[name] for name in node.input)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        assert scale.shape == zero.shape == (codes.shape[axis],)
        assert scale.size > 1
        assert not zero.any()
        assert 60 <= np.abs(codes.astype(int)).max() <= 64
    activations = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert {held[n.input[2]].dtype for n in activations} == {np.dtype(np.int8)}


def test_the_last_layer_and_the_latents_are_float32(graphs):
    _, int8, _, _ = graphs
    model = onnx.load_from_string(int8)
    producer = {name: node for node in model.graph.node for name in node.output}
    node = producer["latents"]
    while node.op_type not in {"Conv", "Gemm", "MatMul"}:
        assert node.op_type == "Reshape"
        node = producer[node.input[0]]
    assert _held(model)[node.input[1]].dtype == np.float32


def test_latents_are_close_to_float32(graphs):
    from edge_ll_export.precision import open_encoder

    float32, int8, x, _ = graphs
    expected, got = open_encoder(float32)(x), open_encoder(int8)(x)
    assert 0 < np.linalg.norm(got - expected) / np.linalg.norm(expected) < 0.05


def test_feature_extraction_is_untouched():
    from edge_ll_export.quantize_backbone import feature_nodes, quantize_backbone

    float32 = _float32("dscnn")
    before = onnx.load_from_string(float32)
    after = onnx.load_from_string(quantize_backbone(float32, _waves()))
    names = feature_nodes(before)
    kept = [node for node in before.graph.node if node.name in names]
    assert {"Conv", "MatMul", "Log"} <= {node.op_type for node in kept}
    assert [node for node in after.graph.node if node.name in names] == kept
    for node in kept:
        for name in set(node.input) & set(_held(before)):
            assert np.array_equal(_held(before)[name], _held(after)[name])


def test_a_graph_without_a_logarithm_has_no_feature_extraction():
    from edge_ll_export.quantize_backbone import feature_nodes

    assert feature_nodes(onnx.load_from_string(_float32("conv"))) == set()


def test_the_same_input_gives_the_same_bytes_and_nothing_else(tmp_path, monkeypatch, capfd, graphs):
    from edge_ll_export.quantize_backbone import quantize_backbone

    float32, int8, x, _ = graphs
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, disabled = list(root.handlers), root.manager.disable
    assert quantize_backbone(float32, x) == int8
    assert list(tmp_path.iterdir()) == []
    assert (root.handlers, root.manager.disable) == (handlers, disabled)
    assert capfd.readouterr() == ("", "")


def test_the_bias_of_a_channel_that_is_off_does_not_wrap_around():
    from edge_ll_export.precision import open_encoder
    from edge_ll_export.quantize_backbone import quantize_backbone

    backbone = _conv()
    with torch.no_grad():
        norm = backbone.blocks[4]
        norm.weight[0], norm.bias[0] = 1e-11, 2.0
    float32 = _exported(backbone, _images())
    int8 = quantize_backbone(float32, _images())
    expected, got = (open_encoder(graph)(_images()) for graph in (float32, int8))
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 0.05


def test_too_few_calibration_samples_are_refused():
    from edge_ll_export.quantize_backbone import quantize_backbone

    with pytest.raises(ExportError, match="at least 16 calibration samples, got 3"):
        quantize_backbone(_float32("conv"), _images(3))


def test_a_backbone_without_a_layer_to_quantise_is_refused():
    from edge_ll_export.quantize_backbone import quantize_backbone

    with pytest.raises(ExportError, match="no layer lies between"):
        quantize_backbone(_exported(_conv(channels=()), _images()), _images())


def test_samples_of_another_shape_are_refused():
    from edge_ll_export.quantize_backbone import quantize_backbone

    with pytest.raises(ExportError, match="cannot be quantised"):
        quantize_backbone(_float32("conv"), _images()[:, :, :4])


# The choice.


def _report(before: int, after: int, n: int, allowed: float):
    from edge_ll_export.precision import PrecisionReport

    return PrecisionReport(
        float32=Counts(before, n), int8=Counts(after, n), lost=0, gained=0, latent_error=0.0,
        speeds=(), float32_bytes=2, int8_bytes=1, max_accuracy_loss=allowed, runtime="none",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "n", "allowed", "kept"),
    [
        (90, 90, 100, 0.0, True),
        (90, 89, 100, 0.0, False),
        (100, 99, 100, 0.01, True),  # as floats, 1 - 0.99 is more than 0.01
        (100, 98, 100, 0.01, False),
        (90, 95, 100, 0.0, True),
        (0, 0, 0, 0.5, False),
    ],
)
def test_int8_is_kept_within_the_allowed_loss(before, after, n, allowed, kept):
    assert _report(before, after, n, allowed).keeps_int8 is kept


def test_speed_is_measured_for_each_batch_size(graphs):
    from edge_ll_export.precision import measure_speed

    float32, int8, x, _ = graphs
    speeds = measure_speed(float32, int8, x[:3], batches=(1, 8), runs=5)
    assert [speed.batch for speed in speeds] == [1, 8]
    for speed in speeds:
        assert 0 < speed.float32_s < 1
        assert speed.speedup == speed.float32_s / speed.int8_s


# The export.


def _recipe(trained, **quantize):
    from edge_ll_export.recipe import Quantize

    settings = Quantize(**{"backbone": "int8", "calibration_samples": 16, **quantize})
    return dataclasses.replace(trained, recipe=replace(trained.recipe, quantize=settings))


@pytest.fixture(scope="module")
def trained():
    """A student that tells two classes of made-up images apart."""
    from edge_ll_export.fit import fit, training_set
    from edge_ll_export.recipe import Fitting

    trained = _trained(**SMALL)
    fit(
        trained.student,
        training_set(trained.recipe, trained.dataset, trained.split),
        loss=lambda _, logits, labels: torch.nn.functional.cross_entropy(logits, labels),
        fitting=Fitting(epochs=40, batch=16, lr=1e-2),
        seed=0,
    )
    return trained


@pytest.fixture(scope="module")
def graphs_of(trained):
    """The graphs of the trained student, exported once."""
    from edge_ll_export import pack

    shape, learner = trained.student.latent_shape, pack.learner_defaults(trained.recipe, (1,))
    return {
        "export_backbone": _exported(trained.student.backbone, trained.dataset.x),
        "export_tail": pack.export_tail(trained.student.tail, shape),
        "export_step_graphs": pack.export_step_graphs(trained.student.tail, shape, learner),
    }


@pytest.fixture
def export(tmp_path, monkeypatch, graphs_of):
    """Export with one engine; gives the bundle, and what was told."""
    from edge_ll_export import pack

    def run(trained):
        told = []
        monkeypatch.setattr(pack, "why_not", lambda _: "not wanted here")
        for name, graph in graphs_of.items():
            monkeypatch.setattr(pack, name, lambda *_, graph=graph: graph)
        bundle, _ = pack.export_bundle(trained, tmp_path / "b", SIGNER, on_stage=told.append)
        return bundle, told

    return run


def _anchors_are_those_of_the_shipped_backbone(bundle, trained) -> None:
    quantizer = LatentQuantizer(bundle.array("latent_scale"), bundle.array("latent_zero"))
    latents = open_engine(bundle).latents(trained.dataset.x[trained.split.anchors])
    assert np.array_equal(quantizer.encode(latents), bundle.array("anchor_latents"))


def test_an_int8_backbone_is_shipped_with_latents_of_its_own(export, trained, graphs_of):
    from edge_ll_export.precision import open_encoder

    asked = _recipe(trained, max_accuracy_loss=0.1)
    bundle, told = export(asked)
    manifest = bundle.manifest
    assert manifest.backbone_precision == "int8"
    held = onnx.load_from_string(bundle.read(BACKBONE)).graph.initializer
    assert any(item.data_type == onnx.TensorProto.INT8 for item in held)
    _anchors_are_those_of_the_shipped_backbone(bundle, trained)
    x = trained.dataset.x
    float32 = open_encoder(graphs_of["export_backbone"])
    quantizer = LatentQuantizer.fit(float32(x[trained.split.train]))
    assert not np.array_equal(quantizer.scale, bundle.array("latent_scale"))
    metrics = manifest.provenance.metrics
    assert metrics["backbone_int8_acc_n"] == 12
    assert -0.1 <= metrics["backbone_int8_acc_change"] <= 0.1
    assert metrics["backbone_int8_speedup"] > 0
    assert metrics["backbone_int8_speedup_batch_16"] > 0
    assert 0 < metrics["backbone_int8_latent_error"] < 0.1
    assert any(line.startswith("backbone: int8 is kept") for line in told)


def test_float32_is_shipped_where_int8_loses_too_much(export, trained, graphs_of, monkeypatch):
    from edge_ll_export import pack

    quantize = pack.quantize_backbone
    black = np.zeros((16, 1, 8, 8), np.uint8)  # the ranges of these cut every image off
    monkeypatch.setattr(pack, "quantize_backbone", lambda graph, _: quantize(graph, black))
    asked = _recipe(trained, max_accuracy_loss=0.0)
    bundle, told = export(asked)
    assert bundle.manifest.backbone_precision == "float32"
    assert bundle.read(BACKBONE) == graphs_of["export_backbone"]
    _anchors_are_those_of_the_shipped_backbone(bundle, trained)
    assert bundle.manifest.provenance.metrics["backbone_int8_acc_change"] < 0
    (line,) = (line for line in told if line.startswith("backbone: "))
    assert "float32 is kept, int8 loses too much" in line
    assert "of 12 right, in float32 12" in line


def test_float32_is_shipped_where_the_recipe_does_not_ask(export, trained):
    bundle, told = export(_recipe(trained, backbone="float32"))
    assert bundle.manifest.backbone_precision == "float32"
    assert not any("int8" in name for name in bundle.manifest.provenance.metrics)
    assert not any("int8" in line for line in told)


def test_a_training_split_too_small_to_calibrate_on_is_an_error(export, trained):
    with pytest.raises(
        ExportError, match=r"calibration_samples: expected at most \d+, .* got 5000"
    ):
        export(_recipe(trained, calibration_samples=5000))


def test_a_holdout_without_base_classes_is_an_error(export, trained):
    y, split = trained.dataset.y, trained.split
    split = dataclasses.replace(split, holdout=split.holdout[y[split.holdout] > 1])
    with pytest.raises(ExportError, match=r"raise split\.holdout"):
        export(dataclasses.replace(_recipe(trained), split=split))
