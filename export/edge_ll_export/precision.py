"""Float32 or int8: what an int8 backbone costs in accuracy and gains in speed, measured.

Needs neither torch nor onnx, so that the speed can be measured where a device's packages are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edge_ll.bundle import BACKBONE, TAIL
from edge_ll.engine.runtime import RuntimeOptions, open_session, run, runtime_name
from edge_ll.metrics import Counts

Float32 = npt.NDArray[np.float32]
Encoder = Callable[[npt.NDArray[Any]], Float32]
"""Raw inputs ``[N, ...]`` to latents float32 ``[N, ...]``."""

BATCHES = (1, 16)
RUNS = 60

_ENCODE_BATCH = 256
_WARM_UP = 5


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Median CPU time of one run of the backbone on a batch, in both precisions."""

    batch: int
    float32_s: float
    int8_s: float

    @property
    def speedup(self) -> float:
        """How many times as fast int8 is."""
        return self.float32_s / self.int8_s


class PrecisionReport(msgspec.Struct, frozen=True, kw_only=True):
    """An int8 backbone against its float32 original, on samples that set nothing in either.

    Attributes:
        float32: What the student gets right with the float32 backbone.
        int8: The same with the int8 backbone and the same tail.
        lost: Samples that only float32 gets right.
        gained: Samples that only int8 gets right.
        latent_error: Norm of the latents' difference, as a share of the latents' norm.
        speeds: One for each batch size.
        float32_bytes: Size of the float32 graph.
        int8_bytes: Size of the int8 graph.
        max_accuracy_loss: What the recipe allows.
        runtime: Where it was measured.
    """

    float32: Counts
    int8: Counts
    lost: int
    gained: int
    latent_error: float
    speeds: tuple[Speed, ...]
    float32_bytes: int
    int8_bytes: int
    max_accuracy_loss: float
    runtime: str

    @property
    def acc_change(self) -> float:
        """Accuracy with int8 minus accuracy with float32."""
        return self.int8.accuracy - self.float32.accuracy

    @property
    def keeps_int8(self) -> bool:
        """Whether the loss is within what the recipe allows; never where nothing was counted."""
        missing = self.float32.correct - self.int8.correct
        return self.int8.n > 0 and missing <= self.max_accuracy_loss * self.int8.n + 1e-9

    @property
    def metrics(self) -> dict[str, float]:
        """The figures under the names that the manifest keeps them by."""
        return {
            "backbone_int8_acc_change": self.acc_change,
            "backbone_int8_acc_n": float(self.int8.n),
            "backbone_int8_lost": float(self.lost),
            "backbone_int8_gained": float(self.gained),
            "backbone_int8_latent_error": self.latent_error,
            "backbone_int8_size": self.int8_bytes / self.float32_bytes,
            **{
                "backbone_int8_speedup" + (f"_batch_{s.batch}" if s.batch > 1 else ""): s.speedup
                for s in self.speeds
            },
        }

    @property
    def text(self) -> str:
        """One line for people."""
        outcome = "int8 is kept" if self.keeps_int8 else "float32 is kept, int8 loses too much"
        speeds = ", ".join(f"{s.speedup:.2f} times at batch {s.batch}" for s in self.speeds)
        return (
            f"backbone: {outcome}: {self.int8.correct} of {self.int8.n} right, in float32 "
            f"{self.float32.correct} ({self.lost} lost, {self.gained} gained; change "
            f"{self.acc_change:+.4f}, allowed {-self.max_accuracy_loss:.4f}); speed {speeds} on "
            f"{self.runtime}; {self.int8_bytes:,} bytes instead of {self.float32_bytes:,}"
        )


def open_encoder(backbone: bytes) -> Encoder:
    """The backbone in the installed runtime, with a device's options.

    Raises:
        EngineError: The runtime refuses the graph.
    """
    session = open_session(BACKBONE, backbone, RuntimeOptions())

    def encode(x: npt.NDArray[Any]) -> Float32:
        batches = (x[i : i + _ENCODE_BATCH] for i in range(0, len(x), _ENCODE_BATCH))
        return np.concatenate([run(session, ["latents"], {"x": batch})[0] for batch in batches])

    return encode


def compare_precisions(
    float32: bytes,
    int8: bytes,
    *,
    tail: tuple[bytes, Float32],
    x: npt.NDArray[Any],
    y: npt.NDArray[np.int64],
    classes: Sequence[int],
    max_accuracy_loss: float,
) -> PrecisionReport:
    """Measure accuracy and speed of both backbones.

    Args:
        float32: The exported backbone.
        int8: The same, quantised.
        tail: The tail's graph, and θ.
        x: Held-out raw samples ``[N, ...]``, none of them used for training or calibration.
        y: Their labels, int64 ``[N]``.
        classes: The only classes that a prediction may be, as on a device that knows these.
        max_accuracy_loss: See :class:`PrecisionReport`.
    """
    graph, theta = tail
    session = open_session(TAIL, graph, RuntimeOptions())
    latents = [open_encoder(backbone)(x) for backbone in (float32, int8)]
    right = []
    for z in latents:
        logits = run(session, ["logits"], {"latents": z, "theta": theta})[0]
        right.append(np.asarray(classes)[logits[:, list(classes)].argmax(axis=1)] == y)
    before, after = right
    return PrecisionReport(
        float32=Counts(int(before.sum()), len(y)),
        int8=Counts(int(after.sum()), len(y)),
        lost=int((before & ~after).sum()),
        gained=int((after & ~before).sum()),
        latent_error=float(np.linalg.norm(latents[1] - latents[0]) / np.linalg.norm(latents[0])),
        speeds=measure_speed(float32, int8, x),
        float32_bytes=len(float32),
        int8_bytes=len(int8),
        max_accuracy_loss=max_accuracy_loss,
        runtime=runtime_name(),
    )


def measure_speed(
    float32: bytes,
    int8: bytes,
    x: npt.NDArray[Any],
    *,
    batches: Sequence[int] = BATCHES,
    runs: int = RUNS,
) -> tuple[Speed, ...]:
    """Median seconds of both backbones on the installed runtime, their runs taking turns.

    One thread, with a device's options. Its CPU time is counted, not the clock on the wall: other
    processes interrupt runs of a few milliseconds for longer than these take.

    Args:
        float32: A backbone.
        int8: The same, quantised.
        x: Raw samples ``[N, ...]``, repeated where a batch needs more.
        batches: Batch sizes.
        runs: Runs of each backbone for each batch size.
    """
    sessions = [open_session(BACKBONE, graph, RuntimeOptions()) for graph in (float32, int8)]
    speeds = []
    for batch in batches:
        feeds = {"x": x[np.arange(batch) % len(x)]}
        times = np.zeros((runs + _WARM_UP, 2))
        for row in times:
            for column, session in enumerate(sessions):
                started = time.thread_time()
                run(session, ["latents"], feeds)
                row[column] = time.thread_time() - started
        medians = np.median(times[_WARM_UP:], axis=0)
        speeds.append(Speed(batch=batch, float32_s=float(medians[0]), int8_s=float(medians[1])))
    return tuple(speeds)
