"""Export every tail once: bundles for the engines, forward graphs for the peer, the batches.

Runs where torch is: ``python -m benchmarks.engines.export FOLDER --tails ... --batches ...``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engines.cases import TAILS, VARIANTS, TailCase
from benchmarks.engines.peer_graph import export_peer
from benchmarks.engines.port import GEMM_SIZE, STUDENT, Arrays, Files, reason
from benchmarks.engines.student import build_student, recipe
from edge_ll.bundle import BACKBONE, TAIL, THETA, write_bundle
from edge_ll.engine import MASKED
from edge_ll.engine.step_graph import BETA1, BETA2, EPSILON
from edge_ll.errors import EdgeLLError
from edge_ll.manifest import (
    DriftDefaults,
    EngineName,
    LearnerDefaults,
    Manifest,
    Provenance,
    TensorSpec,
)
from edge_ll.trust import Signer
from edge_ll_export.graphs import OPSET, export_backbone, export_tail, settle
from edge_ll_export.ort_artifacts import export_ort_artifacts
from edge_ll_export.step_graph import export_step_graphs
from edge_ll_export.tail_loss import BATCH_NAMES, flatten_theta, theta_layout

LEARNER = LearnerDefaults(
    optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=1e-2,
    clip_norm=1.0,
    batch_new=8,
    batch_replay=64,
    steps_per_batch=1,
    buffer_entries=0,
)
STUDENT_BATCH = LEARNER.batch_new + LEARNER.batch_replay
WAVEFORMS = 64


class Made(NamedTuple):
    """A tail to export, with what it stands behind."""

    name: str
    tail: nn.Module
    latent: tuple[int, ...]
    capacity: int
    input: TensorSpec
    backbone: bytes


class Exporter:
    """Fills the folder, and notes in the index what is there and what failed."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._signer = Signer.generate()
        self._rng = np.random.default_rng(0)
        self._tails: dict[str, Any] = {}
        self._reasons: dict[str, dict[str, str]] = {}

    def run(self, tails: list[str], sizes: list[int]) -> None:
        """Everything."""
        self._files.folder.mkdir(parents=True, exist_ok=True)
        self._files.gemm().write_bytes(_gemm_graph())
        self._export(self._student(), [STUDENT_BATCH])
        for name in tails:
            try:
                made = _made(TAILS[name])
            except (AttributeError, TypeError, ValueError) as error:
                self._reasons[name] = {"all engines": reason(error)}
            else:
                self._export(made, sizes)
        index = {
            "public_key": self._signer.public_key.hex(),
            "learner": {
                "learning_rate": LEARNER.learning_rate,
                "weight_decay": LEARNER.weight_decay,
                "clip_norm": LEARNER.clip_norm,
                "betas": [BETA1, BETA2],
                "epsilon": EPSILON,
            },
            "student_batch": STUDENT_BATCH,
            "tails": self._tails,
            "reasons": self._reasons,
        }
        text = json.dumps(index, indent=1)
        (self._files.folder / "index.json").write_text(text, encoding="utf-8")

    def _student(self) -> Made:
        table = recipe()
        waveforms = self._rng.integers(-9000, 9000, (WAVEFORMS, 8000)).astype(np.int16)
        np.save(self._files.waveforms(), waveforms)
        backbone, tail = build_student(waveforms)
        example = torch.from_numpy(waveforms[:7])
        return Made(
            name=STUDENT,
            tail=tail,
            latent=tuple(backbone(example).shape[1:]),
            capacity=table.classes.capacity,
            input=TensorSpec(shape=waveforms.shape[1:], dtype="int16"),
            backbone=export_backbone(backbone, example),
        )

    def _export(self, made: Made, sizes: list[int]) -> None:
        """Everything of one tail; a graph that fails costs its engine only."""
        name, tail = made.name, made.tail
        reasons = self._reasons.setdefault(name, {})
        theta = flatten_theta(tail).numpy()
        np.save(self._files.theta(name), theta)
        raw = theta.astype("<f4").tobytes()
        files = {BACKBONE: made.backbone, TAIL: export_tail(tail, made.latent), THETA: raw}
        of_engine: dict[EngineName, dict[str, bytes]] = {}
        try:
            of_engine["step-graph"] = export_step_graphs(tail, made.latent, LEARNER)
        except EdgeLLError as error:
            reasons["step_graph"] = reason(error)
        try:
            of_engine["ort-training"] = export_ort_artifacts(tail, made.latent, LEARNER)
        except EdgeLLError as error:
            reasons["ort_training"] = reason(error)
        for part in of_engine.values():
            files |= part
        manifest = _manifest(made, tuple(of_engine))
        write_bundle(self._files.bundle(name), manifest, files, self._signer)
        self._tails[name] = {
            "parameters": len(theta),
            "flops": {str(n): self._batches(made, n) for n in sizes},
            "artifact_bytes": {
                engine.replace("-", "_"): len(raw) + sum(map(len, part.values()))
                for engine, part in of_engine.items()
            },
        }

    def _batches(self, made: Made, n: int) -> int:
        """Write the batches of this size and the peer's graph for it; the arithmetic of a step."""
        variants = [_batch(self._rng, made.latent, made.capacity, n) for _ in range(VARIANTS)]
        stacked: dict[str, Any] = {key: np.stack([v[key] for v in variants]) for key in BATCH_NAMES}
        np.savez(self._files.stored_batches(made.name, n), **stacked)
        try:
            graph = export_peer(made.tail, made.latent, made.capacity, n)
            self._files.peer(made.name, n).write_bytes(graph)
        except EdgeLLError as error:
            self._reasons[made.name]["onnxsim"] = reason(error)
        return _flops(made.tail, variants[0])


def _made(case: TailCase) -> Made:
    torch.manual_seed(1)
    return Made(
        name=case.name,
        tail=case.build(),
        latent=case.latent,
        capacity=case.capacity,
        input=TensorSpec(shape=case.latent, dtype="float32"),
        backbone=export_backbone(nn.Identity(), torch.zeros(7, *case.latent)),
    )


def _manifest(made: Made, engines: tuple[EngineName, ...]) -> Manifest:
    return Manifest(
        name=made.name,
        version=1,
        input=made.input,
        latent=TensorSpec(shape=made.latent, dtype="float32"),
        labels=tuple(f"class-{i}" for i in range(made.capacity)),
        base_classes=(0,),
        known_classes=(0,),
        theta=theta_layout(made.tail),
        engines=engines,
        learner=LEARNER,
        drift=DriftDefaults(average_run_length=1e4),
        anchor_groups={},
        arrays={},
        files={},
        provenance=Provenance(recipe="benchmark", created_at_s=0.0),
    )


def _batch(rng: np.random.Generator, latent: tuple[int, ...], capacity: int, n: int) -> Arrays:
    """Random latents, every term of the loss in use, one class masked."""
    mask = np.zeros((n, capacity), np.float32)
    mask[:, -1] = MASKED
    return {
        "latents": rng.standard_normal((n, *latent)).astype(np.float32),
        "labels": rng.integers(0, capacity - 1, n).astype(np.int64),
        "ce_weight": np.ones(n, np.float32),
        "class_mask": mask,
        "target_logits": rng.standard_normal((n, capacity)).astype(np.float32),
        "target_weight": np.full(n, 0.1, np.float32),
    }


def _flops(tail: nn.Module, batch: Arrays) -> int:
    """Multiplications and additions of the products and convolutions of a step.

    Counted forward; each layer's two gradients take as many again, but for that of the first
    layer's input, which is frozen. torch's own count of the way back takes depthwise convolutions
    for dense ones.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tail(torch.from_numpy(batch["latents"]))
    first = next(name for name, layer in tail.named_modules() if hasattr(layer, "weight"))
    of_first = sum(counter.get_flop_counts()[f"{type(tail).__name__}.{first}"].values())
    return int(3 * counter.get_total_flops() - of_first)


def _gemm_graph() -> bytes:
    square = [GEMM_SIZE, GEMM_SIZE]
    a, b, c = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, square) for name in "abc"
    )
    product = onnx.helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = onnx.helper.make_graph([product], "gemm", [a, b], [c])
    opset = [onnx.helper.make_opsetid("", OPSET)]
    return settle(onnx.helper.make_model(graph, opset_imports=opset), "gemm")


def main() -> None:
    """Read the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tails", nargs="*", choices=list(TAILS), required=True)
    parser.add_argument("--batches", nargs="*", type=int, required=True)
    options = parser.parse_args()
    Exporter(Files(options.folder)).run(options.tails, options.batches)


if __name__ == "__main__":
    main()
