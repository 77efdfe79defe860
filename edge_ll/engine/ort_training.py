"""The onnxruntime-training engine: gradients and optimizer by the runtime's own training API.

It uses the runtime's C classes directly, since ``onnxruntime.training`` imports torch. They read
models from paths only, so the bundle's files are laid in a private folder under fixed names.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxruntime.capi import _pybind_state as native

from edge_ll.bundle import ORT_TRAINING, Bundle
from edge_ll.engine.graphs import InferenceGraphs
from edge_ll.engine.port import (
    Batch,
    EngineInfo,
    EngineState,
    Float32,
    Placement,
    check_anchor,
    check_batch,
    check_reference,
    check_theta,
)
from edge_ll.engine.runtime import RuntimeOptions, runtime_name, session_options
from edge_ll.errors import EngineError

TRAINING, EVAL, OPTIMIZER = "training_model.onnx", "eval_model.onnx", "optimizer_model.onnx"
CHECKPOINT = "checkpoint"
FILES = (TRAINING, EVAL, OPTIMIZER, CHECKPOINT)


def is_available() -> bool:
    """Whether the installed onnxruntime can train."""
    return hasattr(native, "Module") and hasattr(native, "load_checkpoint")


class OrtTrainingEngine:
    """See :class:`edge_ll.engine.Engine`."""

    def __init__(self, bundle: Bundle, options: RuntimeOptions) -> None:
        if not is_available():
            raise EngineError(
                f"the engine ort-training needs onnxruntime-training, found {runtime_name()}; run: "
                'pip install "edge-ll[device-ort-training]" in a venv of its own, or use the '
                "engine step-graph, which this runtime can run"
            )
        self._manifest = bundle.manifest
        self._options = options
        self._graphs = InferenceGraphs(bundle, options)
        size = bundle.manifest.theta_size
        self._anchor = np.zeros(size, np.float32), np.zeros(size, np.float32)
        self._files = tempfile.TemporaryDirectory(prefix="edge-ll-")
        for name in FILES:
            (self._folder / name).write_bytes(bundle.read(ORT_TRAINING + name))
        self._open(self._folder / CHECKPOINT)
        self.set_theta(bundle.theta())

    @property
    def _folder(self) -> Path:
        return Path(self._files.name)

    def _open(self, checkpoint: Path) -> None:
        """Build module and optimizer around a checkpoint."""
        device = native.OrtDevice(native.OrtDevice.cpu(), native.OrtDevice.default_memory(), 0)
        settings = session_options(self._options)
        try:
            state = native.load_checkpoint(str(checkpoint))
            module = native.Module(
                str(self._folder / TRAINING), state, str(self._folder / EVAL), device, settings
            )
            optimizer = native.Optimizer(str(self._folder / OPTIMIZER), state, device, settings)
        except Exception as error:  # the runtime's exceptions share no base
            raise EngineError(f"{runtime_name()} refuses the artifacts: {error}") from error
        optimizer.set_learning_rate(self._manifest.learner.learning_rate)
        self._state, self._module, self._optimizer = state, module, optimizer
        self._inputs = module.input_names(True)
        self._theta = self._read_theta()

    def _parameter(self, name: str) -> Any:
        return self._state.get_parameter(f"tail.{name}")

    def _read_theta(self) -> Float32:
        parts = [self._parameter(e.name).data.numpy().reshape(-1) for e in self._manifest.theta]
        return np.concatenate(parts)

    @property
    def info(self) -> EngineInfo:
        """What really runs."""
        return self._graphs.info("ort-training", Placement("training", "CPUExecutionProvider"))

    @property
    def theta(self) -> Float32:
        """A copy of θ, float32 [P]."""
        return self._theta.copy()

    def set_theta(self, theta: Float32) -> None:
        """Replace θ; the optimizer starts anew."""
        theta = check_theta(theta, self._manifest.theta_size)
        self._open(self._folder / CHECKPOINT)
        for entry in self._manifest.theta:
            part = theta[entry.offset : entry.offset + entry.size].reshape(entry.shape)
            value = native.OrtValue.ortvalue_from_numpy(
                np.ascontiguousarray(part),
                native.OrtDevice(native.OrtDevice.cpu(), native.OrtDevice.default_memory(), 0),
            )
            self._state.copy_parameter_from(f"tail.{entry.name}", value)
        self._theta = self._read_theta()

    def latents(self, x: npt.NDArray[Any]) -> Float32:
        """Run the backbone."""
        return self._graphs.latents(x)

    def logits(self, latents: Float32) -> Float32:
        """Run the tail."""
        return self._graphs.logits(latents, self._theta)

    def set_anchor(self, centre: Float32, weight: Float32) -> None:
        """Hold θ near a centre."""
        manifest = self._manifest
        self._anchor = check_anchor(manifest.learner.loss, centre, weight, manifest.theta_size)

    def step(self, batch: Batch, reference: Batch | None = None) -> float:
        """One optimizer step."""
        check_batch(batch, self._manifest.latent.shape, self._manifest.capacity)
        share = 0.0 if reference is None else self._share_against(batch, reference)
        try:
            loss = self._accumulate(batch)
            if reference is not None and share:
                # Gradients add up, and the loss is linear in its weights: this takes the part away.
                self._accumulate(_scaled(reference, -share), anchored=False)
            if not (np.isfinite(loss) and np.isfinite(self._read_gradient()).all()):
                raise EngineError(
                    f"step: loss {loss}; expected finite loss and gradients. θ is unchanged; lower "
                    "the learning rate or look at the batch"
                )
            before = self._theta
            self._optimize(before)
        finally:
            self._module.lazy_reset_grad()
        self._theta = self._read_theta()
        if not np.isfinite(self._theta).all():
            # The runtime updates in place: θ can be brought back, the moments begin anew.
            self.set_theta(before)
            raise EngineError("step: θ overflowed and was brought back; lower the learning rate")
        return loss

    def _optimize(self, before: Float32) -> None:
        try:
            self._optimizer.optimizer_step()
        except Exception as error:  # the runtime's exceptions share no base
            self.set_theta(before)
            raise EngineError(f"step: {error}; θ was brought back") from error

    def gradient(self, batch: Batch) -> Float32:
        """The loss's gradient, of which no step is made."""
        check_batch(batch, self._manifest.latent.shape, self._manifest.capacity)
        gradient = self._gradient(batch)
        if not np.isfinite(gradient).all():
            raise EngineError("gradient: expected finite values; look at the batch")
        return gradient

    def _share_against(self, batch: Batch, reference: Batch) -> float:
        """How much of the reference's gradient A-GEM adds to the batch's, as a factor below 0."""
        manifest = self._manifest
        terms = manifest.learner.loss
        check_reference(terms, reference, manifest.latent.shape, manifest.capacity)
        gradient = self._gradient(batch, anchored=False).astype(np.float64)
        against = self._gradient(reference, anchored=False).astype(np.float64)
        return min(float(gradient @ against), 0.0) / max(float(against @ against), 1e-12)

    def _gradient(self, batch: Batch, *, anchored: bool = True) -> Float32:
        try:
            self._accumulate(batch, anchored=anchored)
            return self._read_gradient()
        finally:
            self._module.lazy_reset_grad()

    def _read_gradient(self) -> Float32:
        parts = [self._parameter(e.name).grad.numpy().reshape(-1) for e in self._manifest.theta]
        return np.concatenate(parts)

    def _accumulate(self, batch: Batch, *, anchored: bool = True) -> float:
        """Add the batch's gradient to what the runtime holds; the batch's loss."""
        centre, weight = self._anchor
        named: dict[str, npt.NDArray[Any]] = {
            **batch._asdict(),
            "anchor_centre": centre,
            "anchor_weight": weight if anchored else np.zeros_like(weight),
        }
        fetches = native.OrtValueVector()
        try:
            self._module.train_step([named[name] for name in self._inputs], fetches)
        except Exception as error:  # the runtime's exceptions share no base
            raise EngineError(f"step: {error}") from error
        return float(fetches[0].numpy())

    def state(self) -> EngineState:
        """A copy of θ and, as a checkpoint file's bytes, of the optimizer."""
        path = self._folder / "saved"
        native.save_checkpoint(self._state, str(path), True)
        return EngineState(self.theta, path.read_bytes())

    def restore(self, state: EngineState) -> None:
        """Go back to a state, bit for bit."""
        theta = check_theta(state.theta, self._manifest.theta_size)
        kept = self._state, self._module, self._optimizer, self._theta
        path = self._folder / "saved"
        path.write_bytes(state.optimizer)
        self._open(path)
        if not np.array_equal(self._theta, theta):
            self._state, self._module, self._optimizer, self._theta = kept
            raise EngineError("the saved checkpoint does not hold the saved θ; nothing changed")


def _scaled(batch: Batch, factor: float) -> Batch:
    """A batch whose loss is ``factor`` times as large."""
    scale = np.float32(factor)
    return batch._replace(
        ce_weight=batch.ce_weight * scale, target_weight=batch.target_weight * scale
    )
