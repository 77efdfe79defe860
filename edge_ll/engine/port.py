"""The engine port: what a runtime must do so that a student can run and learn on it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edge_ll.errors import EngineError

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

MASKED = -1e9
"""Added to the logit of a class that may not be predicted."""


class Batch(NamedTuple):
    """One training batch; every method of continual learning is a way of filling it.

    Attributes:
        latents: float32 [N, *latent].
        labels: int64 [N].
        ce_weight: float32 [N], weight of each sample's cross-entropy.
        class_mask: float32 [N, C], added to the logits before the softmax: 0 or ``MASKED``.
        target_logits: float32 [N, C], logits to stay close to (DER).
        target_weight: float32 [N], weight of each sample's distance to them.
    """

    latents: Float32
    labels: Int64
    ce_weight: Float32
    class_mask: Float32
    target_logits: Float32
    target_weight: Float32


class Placement(NamedTuple):
    """Where one graph really runs.

    Attributes:
        graph: Its name.
        provider: Execution provider, in the runtime's words.
        nodes: Nodes of the graph as the runtime runs it; None where the runtime does not tell.
        placed: Of these, on the provider; the others run on the CPU.
    """

    graph: str
    provider: str
    nodes: int | None = None
    placed: int | None = None


class EngineInfo(NamedTuple):
    """What really runs, for people: ``placements`` says it graph by graph."""

    name: str
    provider: str
    runtime: str
    placements: tuple[Placement, ...] = ()


class EngineState(NamedTuple):
    """Everything that a training step changes."""

    theta: Float32
    optimizer: bytes


class Engine(Protocol):
    """A student on a runtime: frozen backbone, trainable tail with parameters θ.

    A failed call leaves θ and the optimizer as they were.
    """

    @property
    def info(self) -> EngineInfo:
        """What really runs."""
        ...

    @property
    def theta(self) -> Float32:
        """A copy of the tail's parameters, float32 [P]."""
        ...

    def set_theta(self, theta: Float32) -> None:
        """Replace the tail's parameters; the optimizer starts anew.

        Raises:
            EngineError: Wrong length or dtype, or a value that is not finite; the old θ stays.
        """
        ...

    def latents(self, x: npt.NDArray[Any]) -> Float32:
        """Run the backbone: float32 [N, *latent] for raw inputs [N, *input]."""
        ...

    def logits(self, latents: Float32) -> Float32:
        """Run the tail: float32 [N, C]."""
        ...

    def step(self, batch: Batch) -> float:
        """One optimizer step on the batch; the loss before it.

        Raises:
            EngineError: The batch is malformed, or the loss is not finite; nothing has changed.
        """
        ...

    def state(self) -> EngineState:
        """A copy of everything that :meth:`step` changes."""
        ...

    def restore(self, state: EngineState) -> None:
        """Go back to a state, bit for bit."""
        ...


def plain_batch(latents: Float32, labels: Int64, class_mask: Float32) -> Batch:
    """A batch of plain cross-entropy: every sample weighs one, no logits to stay close to.

    ``class_mask`` is float32 [C], the same for every sample.
    """
    n, classes = len(latents), len(class_mask)
    return Batch(
        latents=latents,
        labels=labels,
        ce_weight=np.ones(n, np.float32),
        class_mask=np.tile(class_mask, (n, 1)),
        target_logits=np.zeros((n, classes), np.float32),
        target_weight=np.zeros(n, np.float32),
    )


def check_theta(theta: Float32, size: int) -> Float32:
    """A private copy of θ, or an error.

    Raises:
        EngineError: Wrong shape or dtype, or a value that is not finite.
    """
    if theta.shape != (size,) or theta.dtype != np.float32:
        raise EngineError(f"θ: expected float32 [{size}], got {theta.dtype} {list(theta.shape)}")
    if not np.isfinite(theta).all():
        raise EngineError("θ holds values that are not finite; the old θ stays")
    return theta.copy()


def check_batch(batch: Batch, latent_shape: tuple[int, ...], capacity: int) -> None:
    """Refuse a batch that a runtime would misread.

    Raises:
        EngineError: Which tensor is wrong, what was expected and what came.
    """
    n = len(batch.labels)
    expected: dict[str, tuple[tuple[int, ...], type]] = {
        "latents": ((n, *latent_shape), np.float32),
        "labels": ((n,), np.int64),
        "ce_weight": ((n,), np.float32),
        "class_mask": ((n, capacity), np.float32),
        "target_logits": ((n, capacity), np.float32),
        "target_weight": ((n,), np.float32),
    }
    if not n:
        raise EngineError("a batch needs at least one sample")
    for name, (shape, dtype) in expected.items():
        value = getattr(batch, name)
        if value.shape != shape or value.dtype != dtype:
            raise EngineError(
                f"{name}: expected {np.dtype(dtype)} {list(shape)}, "
                f"got {value.dtype} {list(value.shape)}"
            )
    if batch.labels.min() < 0 or batch.labels.max() >= capacity:
        raise EngineError(f"labels: expected 0 to {capacity - 1}, got up to {batch.labels.max()}")
