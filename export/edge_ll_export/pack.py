"""From a trained student to a signed bundle that was opened again and compared with torch."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import torch

from edge_ll import __version__
from edge_ll.bundle import BACKBONE, RECIPE, TAIL, THETA, TOKENIZER, Bundle, write_bundle
from edge_ll.errors import ExportError
from edge_ll.manifest import (
    ArraySpec,
    DriftDefaults,
    EngineName,
    LearnerDefaults,
    LossTerms,
    Manifest,
    Provenance,
    TensorSpec,
    TokenizerSpec,
)
from edge_ll.novelty import fit_novelty
from edge_ll.quantize import LatentQuantizer
from edge_ll.trust import Signer, TrustStore
from edge_ll_export import pretrained
from edge_ll_export.graphs import export_backbone, export_tail
from edge_ll_export.ort_artifacts import export_ort_artifacts, why_not
from edge_ll_export.parity import TOLERANCE, Parity, check_parity, require_parity
from edge_ll_export.pipeline import Trained
from edge_ll_export.precision import Encoder, PrecisionReport, compare_precisions, open_encoder
from edge_ll_export.quantize_backbone import quantize_backbone
from edge_ll_export.recipe import Recipe
from edge_ll_export.step_graph import export_step_graphs
from edge_ll_export.tail_loss import flatten_theta, theta_layout

Arrays = dict[str, npt.NDArray[np.generic]]
OnStage = Callable[[str], None]

_EXAMPLE = 7  # samples to trace the backbone with; no axis of a model here has this size


def export_bundle(
    trained: Trained,
    path: Path,
    signer: Signer,
    *,
    version: int = 1,
    on_stage: OnStage | None = None,
) -> tuple[Bundle, list[Parity]]:
    """Write the bundle, open it again, and hold every engine in it against torch.

    A bundle that fails leaves no file, and an earlier one at ``path`` as it was.

    Args:
        trained: The student and what it was made from.
        path: Where the bundle goes.
        signer: Signs it.
        version: Of the bundle; a device takes only a higher one than it runs.
        on_stage: Told what is being done.

    Returns:
        The opened bundle, and the agreement of each engine with torch.

    Raises:
        ExportError: A graph cannot be exported, or disagrees with torch.
    """
    told = on_stage or (lambda _: None)
    recipe, student = trained.recipe, trained.student
    learner = learner_defaults(recipe, student.latent_shape)
    shape = student.latent_shape
    told("backbone")
    example = torch.from_numpy(trained.dataset.x[trained.split.train[:_EXAMPLE]])
    backbone = export_backbone(student.backbone, example)
    _check_backbone(open_encoder(backbone), trained)
    theta = flatten_theta(student.tail).numpy().astype("<f4")
    told("inference graph")
    tail = export_tail(student.tail, shape)
    report = None
    if recipe.quantize.backbone == "int8":
        told("int8 backbone")
        backbone, report = _with_int8(trained, backbone, (tail, theta))
        told(report.text)
    files = {
        BACKBONE: backbone,
        TAIL: tail,
        THETA: theta.tobytes(),
        RECIPE: msgspec.json.encode(recipe),
    }
    if trained.dataset.spec.kind == "text":
        files[TOKENIZER] = pretrained.minilm_file(pretrained.TOKENIZER)
    told("step graph")
    files |= export_step_graphs(student.tail, shape, learner)
    engines: tuple[EngineName, ...] = ("step-graph",)
    left_out = why_not(learner)
    if left_out is not None:
        told(f"engine ort-training left out: {left_out}")
    else:
        told("onnxruntime-training artifacts")
        files |= export_ort_artifacts(student.tail, shape, learner)
        engines = ("step-graph", "ort-training")
    told("reference statistics")
    arrays = _arrays(trained, open_encoder(backbone))
    files |= {f"arrays/{name}": _raw(array) for name, array in arrays.items()}
    manifest = _manifest(trained, learner, engines, arrays, version, report)
    staged = path.with_name(path.name + ".unchecked")
    trust = TrustStore([signer.public_key])
    try:
        write_bundle(staged, manifest, files, signer)
        told("parity with torch")
        bundle = Bundle.open(staged, trust)
        parities = [check_parity(bundle, engine, student.tail) for engine in engines]
        for parity in parities:
            require_parity(parity)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    return Bundle.open(path, trust), parities


def learner_defaults(recipe: Recipe, latent_shape: tuple[int, ...]) -> LearnerDefaults:
    """The recipe's learner in the manifest's words, its buffer within both of its limits."""
    learner = recipe.learner
    entry_bytes = math.prod(latent_shape) + np.dtype(np.int64).itemsize
    return LearnerDefaults(
        optimizer=learner.optimizer,
        learning_rate=learner.lr,
        weight_decay=learner.weight_decay,
        clip_norm=learner.clip_norm,
        momentum=learner.momentum,
        batch_new=learner.batch_new,
        batch_replay=learner.batch_replay,
        steps_per_batch=learner.steps_per_batch,
        buffer_entries=min(learner.buffer_entries, learner.buffer_bytes // entry_bytes),
        loss=LossTerms(
            target=learner.target,
            temperature=learner.temperature,
            anchor=learner.anchor,
            projection=learner.projection,
        ),
    )


def _with_int8(
    trained: Trained, float32: bytes, tail: tuple[bytes, npt.NDArray[np.float32]]
) -> tuple[bytes, PrecisionReport]:
    """The backbone to ship, int8 if that loses no more than the recipe allows, and the figures.

    Calibrated on training samples that the seed chooses, measured on the holdout's base classes.
    """
    recipe, split, x, y = trained.recipe, trained.split, trained.dataset.x, trained.dataset.y
    wanted = recipe.quantize.calibration_samples
    if len(split.train) < wanted:
        raise ExportError(
            f"quantize.calibration_samples: expected at most {len(split.train)}, the size of the "
            f"training split, got {wanted}"
        )
    held = split.holdout[np.isin(y[split.holdout], recipe.classes.base)]
    if not len(held):
        raise ExportError(
            "quantize.backbone: the holdout has no sample of a base class to measure int8 on; "
            "raise split.holdout"
        )
    chosen = np.random.default_rng(recipe.seed).permutation(split.train)[:wanted]
    int8 = quantize_backbone(float32, x[np.sort(chosen)])
    report = compare_precisions(
        float32,
        int8,
        tail=tail,
        x=x[held],
        y=y[held],
        classes=recipe.classes.base,
        max_accuracy_loss=recipe.quantize.max_accuracy_loss,
    )
    return (int8 if report.keeps_int8 else float32), report


def _arrays(trained: Trained, encode: Encoder) -> Arrays:
    """Everything numeric that the device gets beside the graphs.

    Latents are those of the shipped backbone, whatever its precision: the device compares its own
    with them.
    """
    recipe, split, x, y = trained.recipe, trained.split, trained.dataset.x, trained.dataset.y
    train = encode(x[split.train])
    quantizer = LatentQuantizer.fit(train)
    unseen = np.concatenate([split.holdout, split.anchors])
    unseen = unseen[np.isin(y[unseen], recipe.classes.base)]
    novelty = fit_novelty(
        train, y[split.train], encode(x[unseen]), directions=recipe.drift.components
    )
    exemplars = _exemplars(trained)
    return {
        "latent_scale": quantizer.scale,
        "latent_zero": quantizer.zero,
        "anchor_latents": quantizer.encode(encode(x[split.anchors])),
        "anchor_labels": y[split.anchors],
        "exemplar_latents": quantizer.encode(encode(x[exemplars])),
        "exemplar_labels": y[exemplars],
        **{f"novelty_{field}": array for field, array in novelty._asdict().items()},
    }


def _exemplars(trained: Trained) -> npt.NDArray[np.int64]:
    """Training samples that fill the device's replay buffer at first: as many of each class."""
    recipe, train = trained.recipe, trained.split.train
    entries = learner_defaults(recipe, trained.student.latent_shape).buffer_entries
    share = entries // len(recipe.classes.base)
    rng = np.random.default_rng(recipe.seed)
    labels = trained.dataset.y[train]
    chosen = [rng.permutation(train[labels == c])[:share] for c in recipe.classes.base]
    return rng.permutation(np.concatenate(chosen))


def _manifest(
    trained: Trained,
    learner: LearnerDefaults,
    engines: tuple[EngineName, ...],
    arrays: Arrays,
    version: int,
    report: PrecisionReport | None,
) -> Manifest:
    recipe, spec = trained.recipe, trained.dataset.spec
    groups = {"base": recipe.classes.base} | {
        f"experience-{i}": classes for i, classes in enumerate(recipe.classes.experiences, 1)
    }
    described = {
        name: ArraySpec(file=f"arrays/{name}", dtype=a.dtype.name, shape=a.shape)  # type: ignore[arg-type]
        for name, a in arrays.items()
    }
    versions = {
        "edge-ll": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
    }
    metrics = trained.metrics
    return Manifest(
        name=recipe.name,
        version=version,
        input=TensorSpec(shape=spec.shape, dtype=spec.dtype),  # type: ignore[arg-type]
        latent=TensorSpec(shape=trained.student.latent_shape, dtype="float32"),
        labels=recipe.classes.labels,
        base_classes=recipe.classes.base,
        known_classes=recipe.classes.base,
        theta=theta_layout(trained.student.tail),
        engines=engines,
        learner=learner,
        drift=DriftDefaults(
            average_run_length=recipe.drift.average_run_length, tolerance=recipe.drift.tolerance
        ),
        anchor_groups=groups,
        arrays=described,
        files={},
        provenance=Provenance(
            recipe=recipe.name,
            created_at_s=time.time(),
            versions=versions,
            metrics={
                "teacher_acc": metrics.teacher_acc,
                "student_acc": metrics.student_acc,
                "student_acc_without_teacher": metrics.student_acc_without_teacher,
                **(report.metrics if report else {}),
            },
        ),
        backbone_precision="int8" if report and report.keeps_int8 else "float32",
        tokenizer=(
            TokenizerSpec(file=TOKENIZER, max_length=spec.shape[0]) if spec.kind == "text" else None
        ),
    )


def _check_backbone(encode: Encoder, trained: Trained) -> None:
    """The exported backbone, float32 still, must give torch's latents on real samples."""
    x = trained.dataset.x[trained.split.anchors]
    expected = trained.student.backbone.encode(torch.from_numpy(x)).numpy()
    worst = float(np.abs(encode(x) - expected).max())
    scale = max(1.0, float(np.abs(expected).max()))
    if not worst <= TOLERANCE * scale:
        raise ExportError(
            f"backbone: its latents differ from torch's by {worst:.2e}; allowed "
            f"{TOLERANCE * scale:.1e}"
        )


def _raw(array: npt.NDArray[np.generic]) -> bytes:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
