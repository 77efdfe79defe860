"""A bundle at work on this device: learner, drift monitor, and the counts for reports."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from edge_ll.bundle import BACKBONE, Bundle
from edge_ll.engine.port import Engine, Float32, Int64
from edge_ll.errors import EngineError, SampleError
from edge_ll.manifest import Digest
from edge_ll.messages import BundleRef
from edge_ll.metrics import Counts
from edge_ll.quantize import LatentQuantizer
from edge_ll_device.config import LearningConfig
from edge_ll_device.drift import DriftMonitor, Float64
from edge_ll_device.learner import Anchors, Learner, Snapshot, latent_quantizer
from edge_ll_device.replay import BufferState, ReplayBuffer
from edge_ll_device.source import Sample

log = logging.getLogger(__name__)


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen and done since the agent's first start, whichever bundle ran.

    Attributes:
        taken: Samples taken from the source, refused ones included: the position in a stream.
        seen: Samples predicted.
        learned: Samples learned from.
        learned_here: Of these, on the bundle that runs now.
        refused: Samples refused, and labelled samples whose training step was refused.
        experience: Number of the current experience, from 1; 0 before the first.
        prequential: Predictions made before the label was learned.
        loss: Of the last training step.
    """

    taken: int = 0
    seen: int = 0
    learned: int = 0
    learned_here: int = 0
    refused: int = 0
    experience: int = 0
    prequential: Counts = Counts(0, 0)
    loss: float | None = None


class Learned(NamedTuple):
    """Everything about a student that outlives the process."""

    snapshot: Snapshot
    tally: Tally
    drift: Float64


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
        buffer.add(*_labelled(bundle, quantizer, "exemplar"))
        anchors = Anchors(*_labelled(bundle, quantizer, "anchor"))
        self.bundle = bundle
        self._quantizer = quantizer
        self.learner = Learner(engine, manifest, anchors=anchors, buffer=buffer)
        self.drift = DriftMonitor(bundle.novelty(), manifest, rng)
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

    def learned(self) -> Learned:
        """A copy of everything that :meth:`take` changes."""
        return Learned(self.learner.snapshot(), self.tally, self.drift.state())

    def restore(self, learned: Learned) -> None:
        """Go on from what was learned before."""
        self.learner.restore(learned.snapshot)
        self.drift.restore(learned.drift)
        self.tally = learned.tally

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
        try:
            latents = self.learner.encode(np.stack([sample.x for sample in accepted]))
            predicted, confidence = self.learner.predict(latents)
        except EngineError as error:  # the runtime may lack the memory for these, not for fewer
            self._refuse(len(accepted), str(error))
            return
        finite = np.isfinite(confidence)  # finite inputs may still overflow in the graphs
        if not finite.all():
            self._refuse(int((~finite).sum()), "it overflows in the student")
            accepted = [s for s, good in zip(accepted, finite.tolist(), strict=True) if good]
            latents, predicted = latents[finite], predicted[finite]
        if not accepted:
            return
        labels = np.array([-1 if s.label is None else s.label for s in accepted], np.int64)
        labelled = labels >= 0
        hits = int((predicted[labelled] == labels[labelled]).sum())
        self._watch(latents, labels, predicted)
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
        self.tally = replace(previous.tally, learned_here=0)
        if previous.backbone != self.backbone:
            return "the backbone changed: the replay buffer starts anew"
        self.learner.carry_over(*self._translated(previous))
        kept = f"kept {len(self.learner.buffer)} replay entries"
        if previous.reference != self.reference or previous.labels != self.labels:
            return f"{kept}; drift is watched anew, against the new reference"
        self.drift = previous.drift
        return f"{kept} and the drift evidence"

    def self_test(self) -> None:
        """Run everything once: what does not fit together fails here, not on the first sample.

        Raises:
            EngineError: A graph does not run.
            ValueError: Arrays that do not fit each other or the graphs.
        """
        spec = self.bundle.manifest.input
        latents = self.learner.encode(np.zeros((1, *spec.shape), spec.dtype))
        if latents.shape[1:] != self.bundle.manifest.latent.shape:
            raise ValueError(f"the backbone gives latents {list(latents.shape[1:])}")
        self.learner.predict(latents)
        self.learner.anchor_counts()
        self.bundle.novelty().score(latents)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, by number."""
        return self.bundle.manifest.labels

    @property
    def reference(self) -> frozenset[Digest]:
        """Hashes of the novelty reference: equal references make equal evidence."""
        manifest = self.bundle.manifest
        specs = (spec for name, spec in manifest.arrays.items() if name.startswith("novelty_"))
        return frozenset(manifest.files[spec.file].sha256 for spec in specs)

    def _translated(self, previous: Student) -> tuple[BufferState, Int64]:
        """Another bundle's memory in this one's codes and classes; classes go by their names."""
        mine = {name: number for number, name in enumerate(self.bundle.manifest.labels)}
        table = np.array([mine.get(name, -1) for name in previous.bundle.manifest.labels])
        state = previous.learner.buffer.state()
        labels = table[state.labels]
        here = labels >= 0
        seen = np.zeros(len(mine), np.int64)
        seen[table[table >= 0]] = state.seen[table >= 0]
        codes = self._quantizer.encode(previous._quantizer.decode(state.codes[here]))
        known = table[list(previous.learner.known_classes)]
        return BufferState(codes, labels[here], seen), known[known >= 0]

    def _accept(self, sample: Sample) -> bool:
        try:
            self.learner.check(sample.x, sample.label)
        except SampleError as error:
            self._refuse(1, str(error))
            return False
        return True

    def _watch(self, latents: Float32, labels: Int64, predicted: Int64) -> None:
        was_calm = not self.drift.alarm
        self.drift.observe(latents, labels, predicted)
        if was_calm and self.drift.alarm:
            log.warning("drift.detected", extra={"seen": self.tally.seen})

    def _learn(self, latents: Float32, labels: npt.NDArray[Any]) -> None:
        try:
            loss = self.learner.learn(latents, labels)
            self.drift.learn(latents, labels)
        except EngineError as error:
            self._refuse(len(labels), str(error))
            return
        self.tally = replace(
            self.tally,
            learned=self.tally.learned + len(labels),
            learned_here=self.tally.learned_here + len(labels),
            loss=loss,
        )

    def _refuse(self, n: int, reason: str) -> None:
        log.warning("sample.refused", extra={"n": n, "reason": reason})
        self.tally = replace(self.tally, refused=self.tally.refused + n)


def _labelled(bundle: Bundle, quantizer: LatentQuantizer, name: str) -> tuple[Float32, Int64]:
    """The bundle's latents and labels of a name.

    Raises:
        ValueError: They do not fit each other or the manifest.
    """
    codes, labels = bundle.array(f"{name}_latents"), bundle.array(f"{name}_labels")
    manifest = bundle.manifest
    if codes.shape != (len(labels), *manifest.latent.shape):
        raise ValueError(f"{name}_latents: {list(codes.shape)} for {len(labels)} labels")
    if len(labels) and not 0 <= labels.min() <= labels.max() < manifest.capacity:
        raise ValueError(f"{name}_labels: expected 0 to {manifest.capacity - 1}")
    return quantizer.decode(codes), labels
