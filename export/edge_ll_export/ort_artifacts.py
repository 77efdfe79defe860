"""The artifacts that onnxruntime-training 1.19.2 trains from: two models, optimizer, checkpoint."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import nn

from edge_ll.bundle import ORT_TRAINING
from edge_ll.engine.ort_training import FILES
from edge_ll.engine.step_graph import BETA1, BETA2, EPSILON
from edge_ll.errors import ExportError, MissingExtraError
from edge_ll.manifest import LearnerDefaults
from edge_ll_export.graphs import IR_VERSION, export_program
from edge_ll_export.step_graph import example_inputs
from edge_ll_export.tail_loss import BATCH_NAMES, TailLoss


def why_not(learner: LearnerDefaults) -> str | None:
    """Why onnxruntime-training cannot take this optimizer's step; None where it can."""
    if learner.optimizer == "sgd" and (learner.momentum or learner.weight_decay):
        return "onnxruntime-training's SGD has neither momentum nor weight decay"
    return None


def export_ort_artifacts(
    tail: nn.Module, latent_shape: tuple[int, ...], learner: LearnerDefaults
) -> dict[str, bytes]:
    """The four files by their names in a bundle.

    Raises:
        ExportError: The gradient of the tail cannot be built.
        MissingExtraError: onnxruntime-training is not installed.
    """
    try:
        from onnxruntime.training import artifacts, onnxblock  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("exporting onnxruntime-training artifacts", "export") from error

    clip = onnxblock.optim.ClipGradNorm(learner.clip_norm)
    if learner.optimizer == "adamw":
        optimizer = onnxblock.optim.AdamW(
            betas=(BETA1, BETA2),
            eps=EPSILON,
            weight_decay=learner.weight_decay,
            clip_grad=clip,
        )
    else:
        optimizer = onnxblock.optim.SGD(clip_grad=clip)
    model = _forward_model(TailLoss(tail, learner.loss), latent_shape)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _quiet():
                artifacts.generate_artifacts(
                    model,
                    requires_grad=[f"tail.{name}" for name, _ in tail.named_parameters()],
                    loss=None,
                    optimizer=optimizer,
                    artifact_directory=folder,
                )
        except Exception as error:  # the builder raises many kinds
            raise ExportError(f"onnxruntime-training cannot build the gradient: {error}") from error
        files = {name: (Path(folder) / name).read_bytes() for name in FILES}
    return {
        ORT_TRAINING + name: _patched(data) if name.endswith(".onnx") else data
        for name, data in files.items()
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the builder: it logs through the root logger, and natively to standard error."""
    root, level = logging.getLogger(), logging.getLogger().level
    sys.stderr.flush()
    kept = os.dup(2)
    root.setLevel(logging.WARNING)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        root.setLevel(level)


def _forward_model(module: TailLoss, latent_shape: tuple[int, ...]) -> onnx.ModelProto:
    """Loss (first output) and logits, with the tail's parameters as initializers."""
    batch = torch.export.Dim("batch", min=1, max=65536)
    axes = tuple({0: batch} if name in BATCH_NAMES else None for name in module.inputs)
    data = export_program(
        module,
        example_inputs(module.tail, latent_shape, module.inputs),
        module.inputs,
        ("loss", "logits"),
        (axes[0], axes[1:]),  # the forward pass takes the latents, then all else as one tuple
        optimize=False,
    )
    return onnx.load_from_string(data)


def _patched(data: bytes) -> bytes:
    """Lower the IR version to what 1.19.2 reads, and take AdamW's decay as torch does."""
    model = onnx.load_from_string(data)
    model.ir_version = min(model.ir_version, IR_VERSION)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "AdamWOptimizer" and attribute.name == "adam_mode":
                attribute.i = 0
    patched: bytes = model.SerializeToString()
    return patched
