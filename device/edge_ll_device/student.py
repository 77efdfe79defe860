"""A bundle at work on this device: learner, drift monitor, and the counts for reports."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from edge_ll.bundle import BACKBONE, Bundle
from edge_ll.engine.port import Engine, Float32
from edge_ll.errors import EngineError, SampleError
from edge_ll.manifest import Digest
from edge_ll.messages import BundleRef
from edge_ll.metrics import Counts
from edge_ll_device.config import LearningConfig
from edge_ll_device.drift import DriftMonitor
from edge_ll_device.learner import Anchors, Learner, latent_quantizer
from edge_ll_device.replay import ReplayBuffer
from edge_ll_device.source import Sample

log = logging.getLogger(__name__)


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen and done since the agent's first start, whichever bundle ran.

    Attributes:
        taken: Samples taken from the source, refused ones included: the position in a stream.
        seen: Samples predicted.
        learned: Samples learned from.
        refused: Samples refused, and labelled samples whose training step was refused.
        experience: Number of the current experience, from 1; 0 before the first.
        prequential: Predictions made before the label was learned.
        loss: Of the last training step.
    """

    taken: int = 0
    seen: int = 0
    learned: int = 0
    refused: int = 0
    experience: int = 0
    prequential: Counts = Counts(0, 0)
    loss: float | None = None


class Student:
    """The running bundle.

    Args:
        bundle: Verified and opened.
        engine: Runs it.
        learning: The device's own settings.
    """

    def __init__(self, bundle: Bundle, engine: Engine, learning: LearningConfig) -> None:
        manifest = bundle.manifest
        rng = np.random.default_rng(learning.seed)
        quantizer = latent_quantizer(bundle.array)
        entries = learning.buffer_entries or manifest.learner.buffer_entries
        buffer = ReplayBuffer(
            entries if learning.replay else 0,
            manifest.latent.shape,
            classes=manifest.capacity,
            quantizer=quantizer,
            rng=rng,
        )
        buffer.add(
            quantizer.decode(bundle.array("exemplar_latents")), bundle.array("exemplar_labels")
        )
        anchors = Anchors(
            quantizer.decode(bundle.array("anchor_latents")), bundle.array("anchor_labels")
        )
        self.bundle = bundle
        self.learner = Learner(engine, manifest, anchors=anchors, buffer=buffer)
        self.drift = DriftMonitor(bundle.novelty(), manifest.drift, rng)
        self.tally = Tally()

    @property
    def ref(self) -> BundleRef:
        """Which bundle runs."""
        manifest = self.bundle.manifest
        return BundleRef(name=manifest.name, version=manifest.version, digest=self.bundle.digest)

    @property
    def backbone(self) -> Digest:
        """sha256 of the backbone: equal backbones make equal latents."""
        return self.bundle.manifest.files[BACKBONE].sha256

    def take(self, samples: Sequence[Sample]) -> None:
        """Predict each sample, watch for drift, then learn from the labelled ones.

        A refused sample is counted and logged, and costs the others nothing.
        """
        if not samples:
            return
        self.tally = replace(
            self.tally,
            taken=self.tally.taken + len(samples),
            experience=samples[-1].experience,
        )
        accepted = [sample for sample in samples if self._accept(sample)]
        if not accepted:
            return
        latents = self.learner.encode(np.stack([sample.x for sample in accepted]))
        predicted, _ = self.learner.predict(latents)
        labels = np.array([-1 if s.label is None else s.label for s in accepted], np.int64)
        labelled = labels >= 0
        hits = int((predicted[labelled] == labels[labelled]).sum())
        self._watch(latents, labels)
        tally = self.tally
        self.tally = replace(
            tally,
            seen=tally.seen + len(accepted),
            prequential=tally.prequential + Counts(hits, int(labelled.sum())),
        )
        if labelled.any():
            self._learn(latents[labelled], labels[labelled])

    def adopt(self, previous: Student) -> str:
        """Take over what another bundle's student remembers; says what became of it."""
        self.tally = previous.tally
        if previous.backbone != self.backbone:
            return "the backbone changed: the replay buffer starts anew"
        self.learner.carry_over(previous.learner.snapshot())
        self.drift = previous.drift
        return f"kept {len(self.learner.buffer)} replay entries and the drift evidence"

    def _accept(self, sample: Sample) -> bool:
        try:
            self.learner.check(sample.x, sample.label)
        except SampleError as error:
            self._refuse(1)
            log.warning("sample.refused", extra={"reason": str(error)})
            return False
        return True

    def _watch(self, latents: Float32, labels: npt.NDArray[Any]) -> None:
        expected = (labels < 0) | np.isin(labels, self.bundle.manifest.base_classes)
        was_calm = not self.drift.alarm
        if expected.any():
            self.drift.observe(latents[expected])
        if was_calm and self.drift.alarm:
            log.warning("drift.detected", extra={"seen": self.tally.seen})

    def _learn(self, latents: Float32, labels: npt.NDArray[Any]) -> None:
        try:
            loss = self.learner.learn(latents, labels)
        except EngineError as error:
            self._refuse(len(labels))
            log.warning("step.refused", extra={"reason": str(error)})
            return
        self.tally = replace(self.tally, learned=self.tally.learned + len(labels), loss=loss)

    def _refuse(self, n: int) -> None:
        self.tally = replace(self.tally, refused=self.tally.refused + n)
