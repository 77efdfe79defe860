"""The engine port: what a runtime must do so that a student can run and learn on it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edge_ll.errors import EngineError
from edge_ll.manifest import LossTerms

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
        target_logits: float32 [N, C], logits to stay close to (DER, LwF). Where the bundle's loss
            compares softmaxes (``kl``), a class whose target is ``MASKED`` takes no part.
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

    A failed call leaves θ and the optimizer as they were; only onnxruntime-training, which updates
    in place, begins its moments anew where a step made θ overflow.
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

    def step(self, batch: Batch, reference: Batch | None = None) -> float:
        """One optimizer step on the batch; the loss before it.

        With a reference batch, of any size, the gradient loses the part that would raise the
        reference's loss (A-GEM). The bundle's loss must have been exported with ``projection``.

        Raises:
            EngineError: A batch is malformed, or the loss is not finite; nothing has changed.
        """
        ...

    def gradient(self, batch: Batch) -> Float32:
        """The gradient of the batch's loss by θ, float32 [P], not clipped; nothing changes.

        Raises:
            EngineError: The batch is malformed, or the gradient is not finite.
        """
        ...

    def set_anchor(self, centre: Float32, weight: Float32) -> None:
        """Hold θ near ``centre``: adds ``sum_i weight_i (θ_i - centre_i)²`` to the loss (EWC).

        Both are float32 [P], no weight below zero. Until this is called nothing is held.

        Raises:
            EngineError: The bundle's loss has no anchor, or a vector is wrong; the old one stays.
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


def check_theta(theta: Float32, size: int, name: str = "θ") -> Float32:
    """A private copy of θ or of a vector like it, or an error.

    Raises:
        EngineError: Wrong shape or dtype, or a value that is not finite.
    """
    if theta.shape != (size,) or theta.dtype != np.float32:
        raise EngineError(
            f"{name}: expected float32 [{size}], got {theta.dtype} {list(theta.shape)}"
        )
    if not np.isfinite(theta).all():
        raise EngineError(f"{name} holds values that are not finite; the old one stays")
    return theta.copy()


def check_anchor(
    terms: LossTerms, centre: Float32, weight: Float32, size: int
) -> tuple[Float32, Float32]:
    """Private copies of an anchor's two vectors, or an error.

    Raises:
        EngineError: The loss has no anchor, or a vector is wrong.
    """
    if not terms.anchor:
        raise EngineError(
            "this bundle's loss has no anchor; export one whose recipe says learner.anchor = true"
        )
    checked = check_theta(weight, size, "anchor weight")
    if (checked < 0).any():
        raise EngineError("anchor weight: expected no value below zero")
    return check_theta(centre, size, "anchor centre"), checked


_EXPECTED = (np.float32, np.int64, np.float32, np.float32, np.float32, np.float32)


def check_batch(batch: Batch, latent_shape: tuple[int, ...], capacity: int) -> None:
    """Refuse a batch that a runtime would misread.

    Raises:
        EngineError: Which tensor is wrong, what was expected and what came.
    """
    n = len(batch.labels)
    if not n:
        raise EngineError("a batch needs at least one sample")
    shapes = ((n, *latent_shape), (n,), (n,), (n, capacity), (n, capacity), (n,))
    tensors: tuple[npt.NDArray[Any], ...] = batch
    for name, value, shape, dtype in zip(Batch._fields, tensors, shapes, _EXPECTED, strict=True):
        if value.shape != shape or value.dtype != dtype:
            raise EngineError(
                f"{name}: expected {np.dtype(dtype)} {list(shape)}, "
                f"got {value.dtype} {list(value.shape)}"
            )
    low, high = int(batch.labels.min()), int(batch.labels.max())
    if low < 0 or high >= capacity:
        raise EngineError(f"labels: expected 0 to {capacity - 1}, got {low} to {high}")


def check_reference(
    terms: LossTerms, reference: Batch, latent_shape: tuple[int, ...], capacity: int
) -> None:
    """Refuse a reference batch that is malformed or that the bundle has no graph for.

    Raises:
        EngineError: What is wrong with it.
    """
    if not terms.projection:
        raise EngineError(
            "this bundle cannot project gradients; export one whose recipe says "
            "learner.projection = true"
        )
    check_batch(reference, latent_shape, capacity)
