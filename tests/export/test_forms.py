"""The forms of the step graph: each computes what torch computes, in fewer or faster operators."""

from __future__ import annotations

import numpy as np
import pytest

from edge_ll.errors import ExportError
from edge_ll.manifest import LossTerms
from tests.tiny_bundle import exported_step

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

SHAPES = [
    # channels (more than one: else it is no depthwise one), height, width, kernel height and width
    (2, 25, 5, 3, 3),
    (3, 8, 8, 3, 3),
    (2, 24, 1, 9, 1),
    (2, 7, 3, 5, 3),
    (2, 4, 4, 1, 1),
    (4, 48, 6, 3, 3),
]


class _Depthwise(torch.nn.Module):
    """Output and both gradients of a depthwise convolution, as the step graph writes them."""

    def forward(self, x, weight, gradient):
        aten = torch.ops.aten
        padding = [(weight.shape[2] - 1) // 2, (weight.shape[3] - 1) // 2]
        how = ([1, 1], padding, [1, 1], False, [0, 0], weight.shape[0])
        y = aten.convolution(x, weight, None, *how)
        by_x, by_weight, _ = aten.convolution_backward(
            gradient, x, weight, None, *how, [True, True, False]
        )
        return y, by_x, by_weight


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_depthwise_convolution_is_torch_s_and_so_are_its_gradients(shape):
    import onnxruntime

    from edge_ll_export.forms import translations
    from edge_ll_export.graphs import export_program

    channels, height, width, *kernel = shape
    generator = torch.Generator().manual_seed(0)

    def tensors(n):
        size = (n, channels, height, width)
        return (
            torch.randn(size, generator=generator),
            torch.randn((channels, 1, *kernel), generator=generator),
            torch.randn(size, generator=generator),
        )

    batch = torch.export.Dim("batch", min=1, max=1024)
    data = export_program(
        _Depthwise(),
        tensors(13),
        ("x", "weight", "gradient"),
        ("y", "by_x", "by_weight"),
        ({0: batch}, None, {0: batch}),
        forms=translations(),
    )
    assert "Conv" not in {node.op_type for node in onnx.load_from_string(data).graph.node}
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for n in (1, 2, 13, 40):
        given = tensors(n)
        feeds = dict(zip(("x", "weight", "gradient"), (t.numpy() for t in given), strict=True))
        for got, expected in zip(session.run(None, feeds), _Depthwise()(*given), strict=True):
            scale = max(1.0, float(expected.abs().max()))
            assert np.abs(got - expected.numpy()).max() < 1e-5 * scale


def test_a_tall_map_is_cut_and_a_small_one_is_not():
    from edge_ll_export.depthwise import DepthwisePlan

    def plan(height, width):
        return DepthwisePlan.of((None, 4, height, width), (4, 1, 3, 3), (1, 1), 4)

    assert (plan(25, 5).rows, plan(25, 5).matrix_shape) == (5, (35, 25))
    assert plan(8, 8).whole
    assert plan(13, 4).whole  # a prime number of rows: one tile or thirteen


def test_a_map_whose_matrix_would_fill_a_device_is_refused():
    from edge_ll_export.depthwise import DepthwisePlan

    with pytest.raises(ValueError, match=r"map of 31 x 31 .* 236,421,376 bytes"):
        DepthwisePlan.of((None, 64, 31, 31), (64, 1, 3, 3), (1, 1), 64)
    assert DepthwisePlan.of((None, 64, 32, 32), (64, 1, 3, 3), (1, 1), 64).rows == 4


@pytest.mark.parametrize(
    ("weight", "padding", "groups"),
    [((4, 2, 3, 3), (1, 1), 2), ((8, 1, 3, 3), (1, 1), 4), ((4, 1, 3, 3), (0, 0), 4)],
    ids=["grouped", "multiplied", "shrinking"],
)
def test_what_is_not_depthwise_is_refused(weight, padding, groups):
    from edge_ll_export.depthwise import DepthwisePlan

    with pytest.raises(ValueError, match="must be depthwise and keep the size"):
        DepthwisePlan.of((None, 4, 8, 8), weight, padding, groups)


class _Tail(torch.nn.Module):
    """A tail with one layer of a test's choice."""

    def __init__(self, layer):
        super().__init__()
        self.before = torch.nn.Conv2d(4, 4, 1)
        self.layer = layer
        self.head = torch.nn.Linear(4, 3)

    def forward(self, z):
        return self.head(torch.relu(self.layer(self.before(z))).flatten(2).mean(2))


class _Normalise(torch.nn.Module):
    """A norm over one axis, which the form of the norm over everything must not stand in for."""

    def forward(self, x):
        return torch.nn.functional.normalize(x, dim=1)


class _Steps(torch.nn.Module):
    """An operator that torch itself has no gradient for."""

    def forward(self, x):
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize(
    ("layer", "operator", "says"),
    [
        (torch.nn.Conv2d(4, 4, 3, padding=1), "aten.convolution_backward", "kernel .3, 3. in one"),
        (torch.nn.Conv2d(4, 4, 1, stride=2), "aten.convolution", "stride and dilation 1"),
        (torch.nn.ConvTranspose2d(4, 4, 3), "aten.convolution", "not transposed"),
        (torch.nn.Threshold(0.5, 0.0), "aten.threshold_backward", "only ReLU has a form"),
        (_Normalise(), "aten.linalg_vector_norm", "Euclidean norm of a whole tensor"),
        (_Steps(), "prims.bessel_j0", "No ONNX function found"),
    ],
    ids=["3x3", "stride", "transposed", "threshold", "norm over an axis", "no form"],
)
def test_what_cannot_be_trained_fails_at_export_by_operator_and_layer(layer, operator, says):
    from edge_ll_export.step_graph import export_step_graph

    with pytest.raises(ExportError, match=says) as error:
        export_step_graph(_Tail(layer), (4, 6, 6), "adamw", LossTerms())
    text = str(error.value)
    assert f"_Tail, layer layer ({type(layer).__name__}), {operator}: " in text
    assert len(text) < 400


def test_a_layer_that_fixes_the_batch_axis_is_found():
    from edge_ll_export.step_graph import export_step_graph

    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.Linear(6, 3)

        def forward(self, z):
            return torch.relu(self.mix(z)).flatten(1)

    with pytest.raises(ExportError, match="expected any size"):
        export_step_graph(Tokens(), (5, 6), "adamw", LossTerms())


@pytest.mark.parametrize("kind", ["mlp", "pointwise", "separable"])
def test_the_slow_operators_are_not_in_the_graph(kind):
    """Masks by comparison, and copies of what broadcasts by itself."""
    operators = {
        node.op_type for node in onnx.load_from_string(exported_step(kind, "adamw")).graph.node
    }
    assert "HardSigmoid" in operators
    assert not operators & {"Where", "Expand", "LessOrEqual"}


def test_the_linear_step_stays_small():
    """Each operator costs a microsecond or two, which is what a linear tail's step is made of."""
    assert len(onnx.load_from_string(exported_step("linear", "adamw")).graph.node) <= 64
