"""Inference graphs: what torch computes, in operators and versions that every runtime reads."""

from __future__ import annotations

import numpy as np
import pytest

from edge_ll.errors import ExportError
from tests.export.graph_checks import check_portable, run_graph
from tests.tiny_bundle import CAPACITY, TAILS, exported_tail, tail_graph, torch_tail

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")


@pytest.mark.parametrize("kind", TAILS)
def test_a_tail_is_what_torch_computes(kind):
    from edge_ll_export.tail_loss import flatten_theta

    tail, data = torch_tail(kind), exported_tail(kind)
    model = check_portable(data)
    assert [item.name for item in model.graph.input] == ["latents", "theta"]
    assert [item.name for item in model.graph.output] == ["logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 64):
        latents = rng.standard_normal((n, *TAILS[kind].latent)).astype(np.float32)
        (got,) = run_graph(data, ["logits"], latents=latents, theta=flatten_theta(tail).numpy())
        assert got.shape == (n, CAPACITY)
        assert np.abs(got - tail(torch.from_numpy(latents)).detach().numpy()).max() < 1e-5


@pytest.mark.parametrize("kind", TAILS)
def test_theta_is_an_input_and_not_baked_in(kind):
    from edge_ll_export.tail_loss import flatten_theta

    tail = torch_tail(kind)
    with torch.no_grad():
        for parameter in tail.parameters():
            parameter.mul_(-0.5).add_(0.1)
    latents = np.ones((2, *TAILS[kind].latent), np.float32)
    (got,) = run_graph(
        exported_tail(kind), ["logits"], latents=latents, theta=flatten_theta(tail).numpy()
    )
    assert np.abs(got - tail(torch.from_numpy(latents)).detach().numpy()).max() < 1e-5


def test_the_handwritten_tail_is_the_exported_one():
    from edge_ll_export.tail_loss import flatten_theta

    rng = np.random.default_rng(0)
    feeds = {
        "latents": rng.standard_normal((5, *TAILS["linear"].latent)).astype(np.float32),
        "theta": flatten_theta(torch_tail("linear")).numpy(),
    }
    (ours,) = run_graph(tail_graph(), ["logits"], **feeds)
    (theirs,) = run_graph(exported_tail("linear"), ["logits"], **feeds)
    assert np.abs(ours - theirs).max() < 1e-6
    onnx.checker.check_model(onnx.load_from_string(tail_graph()))


def test_a_backbone_takes_raw_input_in_any_number():
    from edge_ll_export.data import InputSpec
    from edge_ll_export.graphs import export_backbone
    from edge_ll_export.models.backbones.conv import ConvBackbone

    torch.manual_seed(0)
    spec = InputSpec(shape=(1, 8, 8), dtype="uint8", full_scale=16.0)
    backbone = ConvBackbone(spec=spec, channels=(3, 4), latent_channels=2)
    with torch.no_grad():
        backbone(torch.randint(0, 17, (50, 1, 8, 8)).to(torch.uint8))  # moves the batch norms
    x = torch.randint(0, 17, (9, 1, 8, 8)).to(torch.uint8)
    data = export_backbone(backbone.train(), x[:3])
    model = check_portable(data)
    assert model.graph.input[0].name == "x"
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    expected = backbone.eval()(x).detach().numpy()
    for n in (1, 2, 9):
        (got,) = run_graph(data, ["latents"], x=x[:n].numpy())
        assert got.shape == (n, *backbone.latent_shape)
        assert np.abs(got - expected[:n]).max() < 1e-5


class Branching(torch.nn.Module):
    """Control flow that depends on values, which no graph can express."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Unsupported(torch.nn.Module):
    """An operator without an ONNX form."""

    def forward(self, x):
        return torch.linalg.eigvals(x[:, :2, None] * x[:, None, :2])


@pytest.mark.parametrize("module", [Branching(), Unsupported()])
def test_what_cannot_be_exported_is_said(module):
    from edge_ll_export.graphs import export_program

    batch = torch.export.Dim("batch", min=1, max=64)
    with pytest.raises(ExportError, match=type(module).__name__):
        export_program(module, (torch.ones(3, 4),), ("x",), ("y",), ({0: batch},))


def _model(*nodes, initializers=(), opset=("", 18)):
    value = [onnx.helper.make_tensor_value_info(name, 1, ["n"]) for name in "xy"]
    graph = onnx.helper.make_graph(
        nodes or [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "g",
        value[:1],
        value[1:],
        list(initializers),
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(*opset)])


def _external():
    tensor = onnx.helper.make_tensor("w", 1, [1], [1.0])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    return _model(initializers=[tensor])


@pytest.mark.parametrize(
    "model",
    [
        _model(onnx.helper.make_node("Identity", ["absent"], ["y"])),
        _model(onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])),
        _model(onnx.helper.make_node("Custom", ["x"], ["y"], domain="evil"), opset=("evil", 1)),
        _external(),
    ],
    ids=["dangling", "unknown operator", "custom domain", "external data"],
)
def test_a_graph_that_is_not_sound_is_refused(model):
    from edge_ll_export.graphs import settle

    with pytest.raises(ExportError, match="not valid"):
        settle(model, "made up")


def test_settling_strips_what_only_debuggers_read():
    from edge_ll_export.graphs import settle

    model = _model()
    model.ir_version = 13
    model.graph.node[0].doc_string = "/home/somebody/secret.py"
    model.metadata_props.add(key="path", value="/home/somebody")
    data = settle(model, "made up")
    assert b"somebody" not in data
    assert onnx.load_from_string(data).ir_version == 10
