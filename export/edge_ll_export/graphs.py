"""torch modules to ONNX bytes that every supported runtime reads: opset 18, IR 10 at most."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.func import functional_call

from edge_ll.errors import BundleError, ExportError
from edge_ll.onnx_scan import check_onnx
from edge_ll_export.tail_loss import (
    example_batch,
    flatten_theta,
    split_theta,
    theta_layout,
)

OPSET = 18
IR_VERSION = 10


class TailOfTheta(nn.Module):
    """A tail whose parameters come in as one flat vector: (latents, θ) -> logits."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self._tail = [tail]  # in a list: its parameters are inputs here, not members
        self._layout = theta_layout(tail)

    def forward(self, latents: Tensor, theta: Tensor) -> Tensor:
        """Logits float32 [N, C]."""
        logits: Tensor = functional_call(
            self._tail[0], split_theta(theta, self._layout), (latents,)
        )
        return logits


def export_backbone(backbone: nn.Module, example: Tensor) -> bytes:
    """The frozen backbone, raw input ``x`` to ``latents``, with a dynamic batch axis."""
    batch = torch.export.Dim("batch", min=1, max=65536)
    return export_program(backbone.eval(), (example,), ("x",), ("latents",), ({0: batch},))


def export_tail(tail: nn.Module, latent_shape: tuple[int, ...]) -> bytes:
    """The inference graph ``(latents, theta) -> logits``, with a dynamic batch axis."""
    batch = torch.export.Dim("batch", min=1, max=65536)
    return export_program(
        TailOfTheta(tail),
        (torch.zeros((example_batch(tail, latent_shape), *latent_shape)), flatten_theta(tail)),
        ("latents", "theta"),
        ("logits",),
        ({0: batch}, None),
    )


def export_program(
    module: nn.Module,
    example: tuple[Tensor, ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    dynamic_shapes: tuple[Any, ...],
    *,
    optimize: bool = True,
    forms: Mapping[Any, Any] | None = None,
) -> bytes:
    """Export through torch.export and check the result.

    With ``optimize`` off the parameters stay what they are in the module: initializers with the
    module's names, not folded into other constants. ``forms`` are ONNX forms by torch operator,
    in place of the exporter's own.

    Raises:
        ExportError: torch cannot express the module in ONNX, or the result is not self-contained.
    """
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                example,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=dynamic_shapes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                optimize=optimize,
                custom_translation_table=dict(forms or {}),
            )
    except Exception as error:  # the exporter raises many kinds; all mean the same here
        raise ExportError(f"{type(module).__name__}: torch cannot export it: {error}") from error
    finally:
        quiet.setLevel(level)
    if program is None:
        raise ExportError(f"{type(module).__name__}: torch exported nothing")
    return settle(program.model_proto, type(module).__name__)


def settle(model: onnx.ModelProto, name: str) -> bytes:
    """Set the IR version, drop what only debuggers read, check, and give the bytes."""
    model.ir_version = min(model.ir_version, IR_VERSION)
    model.graph.ClearField("value_info")
    model.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    data: bytes = model.SerializeToString()
    try:
        onnx.checker.check_model(model)
        check_onnx(name, data)
    except (onnx.checker.ValidationError, BundleError) as error:
        raise ExportError(f"{name}: the exported graph is not valid: {error}") from error
    return data
