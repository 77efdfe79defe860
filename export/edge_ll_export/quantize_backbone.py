"""A float32 backbone to int8: static, in QDQ form, with a weight scale for each output channel.

Integer quantisation after B. Jacob et al. (CVPR 2018) by ``onnxruntime.quantization``. What stays
float32, and why:

- feature extraction, everything up to the last ``Log`` of the graph: spectra span more orders of
  magnitude than 8 bits do;
- the last layer, and what follows it: an 8-bit output would clip latents of classes that the
  calibration has not seen.

Weights take 7 of their 8 bits. With all 8, sums of two products overflow the 16 bits that x86
processors without VNNI add them in, and the same graph gives other latents there, without a word.
``docs/research/int8.md`` has the measurements behind these choices.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

import edge_ll.engine  # noqa: F401  # before onnxruntime: it switches the runtime's telemetry off
from edge_ll.errors import ExportError
from edge_ll_export.graphs import settle

MIN_SAMPLES = 16

_BATCH = 16
_LAYERS = ("Conv", "Gemm", "MatMul")
_BETWEEN = ("Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool")
_FAINT = 1e-5  # of a layer's largest weight: far below one step of 8 bits


def quantize_backbone(float32: bytes, samples: npt.NDArray[Any]) -> bytes:
    """The same graph with int8 weights and activations; the latents are float32 still.

    The same input gives the same bytes. Only operators of the plain ONNX domain are used.

    Args:
        float32: An exported backbone, input ``x``, output ``latents``.
        samples: Raw inputs ``[N, ...]`` that set the range of each activation.

    Raises:
        ExportError: Too few samples, nothing to quantise, or the graph cannot be quantised.
    """
    if len(samples) < MIN_SAMPLES:
        raise ExportError(
            f"quantisation: expected at least {MIN_SAMPLES} calibration samples, got "
            f"{len(samples)}; raise quantize.calibration_samples"
        )
    model = onnx.load_from_string(float32)
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{number}"
    kept = feature_nodes(model) | last_layers(model)
    if not any(n.op_type in _LAYERS and n.name not in kept for n in model.graph.node):
        raise ExportError(
            "quantisation: no layer lies between the features and the last layer, which both "
            'stay float32; set quantize.backbone = "float32"'
        )
    _zero_faint_channels(model, kept)
    add_pre_process_metadata(model)  # shapes are inferred and batch norms folded already
    with tempfile.TemporaryDirectory(prefix="edge-ll-") as folder, _silent_logging():
        source, target = Path(folder, "float32.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(model.SerializeToString())
        try:
            quantization.quantize_static(
                source,
                target,
                _Samples(model.graph.input[0].name, samples),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=[*_LAYERS, *_BETWEEN],
                nodes_to_exclude=sorted(kept),
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.MinMax,
            )
            quantized = onnx.load(target)
        except Exception as error:  # the library raises many kinds; all mean the same here
            raise ExportError(f"quantisation: the backbone cannot be quantised: {error}") from error
    return settle(quantized, "int8 backbone")


def feature_nodes(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that feature extraction is made of: every ``Log`` and what leads to it."""
    logs = [node for node in model.graph.node if node.op_type == "Log"]
    return _upstream(model, logs, stop=())


def last_layers(model: onnx.ModelProto) -> set[str]:
    """Names of the last layer with weights on each way to the output, and of what follows it."""
    outputs = {item.name for item in model.graph.output}
    ends = [node for node in model.graph.node if outputs.intersection(node.output)]
    return _upstream(model, ends, stop=_LAYERS)


def _upstream(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], *, stop: tuple[str, ...]
) -> set[str]:
    """``nodes`` and all before them, not past an operator of ``stop``."""
    producer = {name: node for node in model.graph.node for name in node.output}
    found: set[str] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found.add(node.name)
            if node.op_type not in stop:
                waiting += [producer[name] for name in node.input if name in producer]
    return found


def _zero_faint_channels(model: onnx.ModelProto, kept: set[str]) -> None:
    """Silence channels whose weights vanish beside the others', but for the layers ``kept``.

    A bias is kept in 32 bits, in steps of (input scale x weight scale): under a channel that batch
    norm has switched off, such a step is so small that the bias would wrap around.
    """
    held = {item.name: item for item in model.graph.initializer}
    for node in model.graph.node:
        plain = node.op_type in {"Conv", "Gemm"} and node.input[1] in held
        if not plain or node.name in kept:
            continue
        weights = numpy_helper.to_array(held[node.input[1]]).copy()
        turned = node.op_type == "Gemm" and not any(
            a.name == "transB" and a.i for a in node.attribute
        )
        channels = weights.T if turned else weights  # a view: output channels first
        largest = np.abs(channels).reshape(len(channels), -1).max(axis=1)
        faint = (largest > 0) & (largest < _FAINT * largest.max())
        if faint.any():
            channels[faint] = 0.0
            held[node.input[1]].CopyFrom(numpy_helper.from_array(weights, node.input[1]))


class _Samples(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Batches of calibration samples, in order."""

    def __init__(self, name: str, samples: npt.NDArray[Any]) -> None:
        self._batches = ({name: samples[i : i + _BATCH]} for i in range(0, len(samples), _BATCH))

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        """The next batch; none at the end."""
        return next(self._batches, None)


@contextmanager
def _silent_logging() -> Iterator[None]:
    """The library logs through the root logger, which would also set up a handler for it."""
    root, nothing = logging.getLogger(), logging.NullHandler()
    disabled = root.manager.disable
    root.addHandler(nothing)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.removeHandler(nothing)
