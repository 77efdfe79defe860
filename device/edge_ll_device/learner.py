"""The learner: predicts, and learns from labelled latents with experience replay.

No IO and no clock; randomness comes from the generator that it is given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge_ll.engine.port import MASKED, Engine, EngineState, Float32, Int64, plain_batch
from edge_ll.errors import EngineError, SampleError
from edge_ll.manifest import Manifest
from edge_ll.metrics import Counts
from edge_ll.quantize import LatentQuantizer
from edge_ll_device.replay import BufferState, ReplayBuffer


class Anchors(NamedTuple):
    """Latents float32 [N, *latent] and labels int64 [N] to measure with, never learned from."""

    latents: Float32
    labels: Int64


class Snapshot(NamedTuple):
    """Everything that learning changes."""

    engine: EngineState
    buffer: BufferState
    known: Int64
    steps: int


class Learner:
    """A student that learns new classes without forgetting the old ones.

    Args:
        engine: Runs the student.
        manifest: Of the student's bundle.
        anchors: For measuring what is kept.
        buffer: Earlier samples; an empty buffer of size 0 makes the naive learner.
    """

    def __init__(
        self, engine: Engine, manifest: Manifest, *, anchors: Anchors, buffer: ReplayBuffer
    ) -> None:
        self.engine = engine
        self.buffer = buffer
        self.steps = 0
        self._manifest = manifest
        self._anchors = anchors
        self._known = set(manifest.known_classes)

    @property
    def known_classes(self) -> tuple[int, ...]:
        """Classes that may be predicted."""
        return tuple(sorted(self._known))

    def check(self, x: npt.NDArray[Any], label: int | None) -> None:
        """Refuse a sample that must not be learned from.

        Raises:
            SampleError: Wrong shape or dtype, a value that is not finite, or a label past capacity.
        """
        spec = self._manifest.input
        if x.shape != spec.shape or x.dtype != np.dtype(spec.dtype):
            raise SampleError(
                f"sample: expected {spec.dtype} {list(spec.shape)}, got {x.dtype} {list(x.shape)}"
            )
        if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
            raise SampleError("sample: holds values that are not finite")
        if label is None:
            return
        if isinstance(label, bool) or not isinstance(label, int | np.integer):
            raise SampleError(f"label: expected an integer or none, got {label!r}")
        if not 0 <= label < self._manifest.capacity:
            raise SampleError(
                f"label {label}: this bundle has room for classes 0 to "
                f"{self._manifest.capacity - 1}; export one with a larger capacity for more"
            )

    def encode(self, x: npt.NDArray[Any]) -> Float32:
        """Latents float32 [N, *latent] of raw inputs [N, *input]."""
        return self.engine.latents(x)

    def predict(self, latents: Float32) -> tuple[Int64, Float32]:
        """The likeliest known class, int64 [N], and its probability, float32 [N]."""
        logits = self.engine.logits(latents) + self._class_mask(self._known)
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)
        chosen = probabilities.argmax(axis=1)
        return chosen.astype(np.int64), probabilities[np.arange(len(chosen)), chosen]

    def learn(self, latents: Float32, labels: Int64) -> float:
        """Experience replay: each step trains on the new samples and on some drawn from before.

        Args:
            latents: float32 [N, *latent].
            labels: int64 [N], checked by :meth:`check`.

        Returns:
            The loss of the last step.

        Raises:
            EngineError: A step was refused. Steps before it stay; the samples do not enter the
                buffer, and classes that came with them are not known yet.
        """
        learner = self._manifest.learner
        known = self._known | set(labels.tolist())
        mask = self._class_mask(known)
        loss = float("nan")
        for _ in range(learner.steps_per_batch):
            old_latents, old_labels = self.buffer.sample(learner.batch_replay)
            batch = plain_batch(
                np.concatenate([latents, old_latents]), np.concatenate([labels, old_labels]), mask
            )
            loss = self.engine.step(batch)
            self.steps += 1
        self._known = known
        self.buffer.add(latents, labels)
        return loss

    def anchor_counts(self) -> dict[str, Counts]:
        """Correct and total per anchor group."""
        labels = self._anchors.labels
        hits = self.predict(self._anchors.latents)[0] == labels if len(labels) else labels > 0
        counts = {}
        for name, classes in self._manifest.anchor_groups.items():
            members = np.isin(labels, classes)
            counts[name] = Counts(int(hits[members].sum()), int(members.sum()))
        return counts

    def snapshot(self) -> Snapshot:
        """A copy of everything that learning changes."""
        known = np.array(self.known_classes, np.int64)
        return Snapshot(self.engine.state(), self.buffer.state(), known, self.steps)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this or an equal learner.

        A snapshot made with another engine keeps everything but the optimizer's moments.
        """
        try:
            self.engine.restore(snapshot.engine)
        except EngineError:
            self.engine.set_theta(snapshot.engine.theta)
        self.buffer.restore(snapshot.buffer)
        self._known = set(snapshot.known.tolist())
        self.steps = snapshot.steps

    def carry_over(self, buffer: BufferState, known: Int64) -> None:
        """Take over an earlier learner's memory, given in this bundle's codes and classes."""
        self.buffer.restore(buffer)
        self._known |= set(known.tolist())

    def _class_mask(self, known: set[int]) -> Float32:
        mask = np.full(self._manifest.capacity, MASKED, np.float32)
        mask[list(known)] = 0.0
        return mask


def latent_quantizer(arrays: Any) -> LatentQuantizer:
    """The bundle's quantizer; ``arrays`` is :meth:`edge_ll.bundle.Bundle.array`."""
    return LatentQuantizer(arrays("latent_scale"), arrays("latent_zero"))
