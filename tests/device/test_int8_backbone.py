"""Integer layers on whatever runtime is installed: what the export quantises, the device computes.

The graph is written by hand, so that this runs where there is no onnx.
"""

from __future__ import annotations

import numpy as np
import pytest

from edge_ll.onnx_scan import check_onnx
from tests.tiny_bundle import Graph

IN, OUT = 32, 8
X_STEP, Y_STEP = 0.05, 0.25


def _weights() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes in 7 bits, a step for each channel, biases in 32 bits."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-64, 65, (OUT, IN)).astype(np.int8)
    codes[:2] = 64  # all at the limit: 8-bit codes would overflow 16-bit sums here
    steps = (0.002 * (1 + np.arange(OUT))).astype(np.float32)
    return codes, steps, rng.integers(-2000, 2000, OUT).astype(np.int32)


def _graph() -> bytes:
    codes, steps, bias = _weights()
    g = Graph()
    x_step, x_zero = g.const(X_STEP), g.const(-10, "int8")
    y_step, y_zero = g.const(Y_STEP), g.const(3, "int8")
    x = g.op("QuantizeLinear", "x", x_step, x_zero)
    x = g.op("DequantizeLinear", x, x_step, x_zero)
    zeros = g.const(np.zeros(OUT), "int8")
    w = g.op("DequantizeLinear", g.const(codes, "int8"), g.const(steps), zeros, axis=0)
    b_steps, b_zeros = g.const(X_STEP * steps), g.const(np.zeros(OUT), "int32")
    b = g.op("DequantizeLinear", g.const(bias, "int32"), b_steps, b_zeros, axis=0)
    y = g.op("QuantizeLinear", g.op("Gemm", x, w, b, transB=1), y_step, y_zero)
    g.op("DequantizeLinear", y, y_step, y_zero, out="latents")
    return g.model({"x": ("float32", ("batch", IN))}, {"latents": ("float32", ("batch", OUT))})


@pytest.mark.parametrize("batch", [1, 16])
def test_integer_layers_are_exact_to_one_step(batch):
    pytest.importorskip("onnxruntime")
    from edge_ll.engine.runtime import RuntimeOptions, open_session, run

    check_onnx("int8", _graph())
    x = np.random.default_rng(1).uniform(-6, 6, (batch, IN)).astype(np.float32)
    x[0] = 6.5  # every activation at its largest code
    codes, steps, bias = _weights()
    x_codes = np.clip(np.round(x / np.float32(X_STEP)) - 10, -128, 127).astype(np.int64) + 10
    sums = x_codes @ codes.T.astype(np.int64) + bias
    y_codes = np.clip(np.round(sums * (X_STEP * steps.astype(float) / Y_STEP)) + 3, -128, 127)
    expected = (y_codes - 3) * Y_STEP
    session = open_session("int8", _graph(), RuntimeOptions())
    (got,) = run(session, ["latents"], {"x": x})
    assert (np.abs(y_codes) < 127).mean() > 0.5, "the test must not only see clipped values"
    assert np.abs(got - expected).max() <= Y_STEP * 1.001
    assert (np.abs(got - expected) < 1e-4).mean() > 0.95
