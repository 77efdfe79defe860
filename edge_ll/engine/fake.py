"""An engine in numpy alone, for tests and for machines without a runtime: a linear tail.

Its backbone flattens the input; θ is ``weight [C, D]`` then ``bias [C]``. It computes the same loss
and the same AdamW or SGD step as the graphs do, and passes the same contract suite.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edge_ll.engine.port import (
    MASKED,
    Batch,
    EngineInfo,
    EngineState,
    Float32,
    check_anchor,
    check_batch,
    check_reference,
    check_theta,
)
from edge_ll.errors import EngineError
from edge_ll.manifest import LearnerDefaults

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-6


class FakeEngine:
    """See :class:`edge_ll.engine.Engine`."""

    def __init__(self, latent_size: int, capacity: int, learner: LearnerDefaults) -> None:
        self._shape = (latent_size,)
        self._capacity = capacity
        self._learner = learner
        self._size = capacity * (latent_size + 1)
        self._anchor = np.zeros(self._size, np.float32), np.zeros(self._size, np.float32)
        self.set_theta(np.zeros(self._size, np.float32))

    @property
    def info(self) -> EngineInfo:
        """What really runs."""
        return EngineInfo("fake", "numpy", f"numpy {np.__version__}")

    @property
    def theta(self) -> Float32:
        """A copy of θ, float32 [P]."""
        return self._theta.copy()

    def set_theta(self, theta: Float32) -> None:
        """Replace θ; the optimizer starts anew."""
        self._theta = check_theta(theta, self._size)
        self._m, self._v = np.zeros_like(self._theta), np.zeros_like(self._theta)
        self._steps = 0

    def latents(self, x: npt.NDArray[Any]) -> Float32:
        """Flatten."""
        flat = x.reshape(len(x), -1).astype(np.float32)
        if flat.shape[1:] != self._shape:
            raise EngineError(f"x: expected {self._shape[0]} values a sample, got {flat.shape[1]}")
        return flat

    def logits(self, latents: Float32) -> Float32:
        """``weight @ latent + bias``."""
        if latents.shape[1:] != self._shape:
            raise EngineError(f"latents: expected [N, {self._shape[0]}], got {latents.shape}")
        split = self._capacity * self._shape[0]
        weight = self._theta[:split].reshape(self._capacity, -1)
        logits: Float32 = latents @ weight.T + self._theta[split:]
        return logits

    def set_anchor(self, centre: Float32, weight: Float32) -> None:
        """Hold θ near a centre."""
        self._anchor = check_anchor(self._learner.loss, centre, weight, self._size)

    def step(self, batch: Batch, reference: Batch | None = None) -> float:
        """One optimizer step on weighted cross-entropy and logit distance."""
        check_batch(batch, self._shape, self._capacity)
        loss, gradient = self._slope(batch)
        if reference is not None:
            check_reference(self._learner.loss, reference, self._shape, self._capacity)
            against = self._slope(reference)[1]
            share = min(float(gradient @ against), 0.0) / max(float(against @ against), 1e-12)
            gradient = gradient - np.float32(share) * against
        centre, weight = self._anchor
        away = self._theta - centre
        loss += float((weight * away * away).sum())
        gradient = gradient + 2 * weight * away
        norm = float(np.sqrt(np.square(gradient).sum()))
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise EngineError(f"step: loss {loss}, gradient norm {norm}; expected finite values")
        clip = self._learner.clip_norm
        before = self._theta, self._m, self._v, self._steps
        self._apply((gradient * (clip / max(norm, clip))).astype(np.float32))
        if not np.isfinite(self._theta).all():
            self._theta, self._m, self._v, self._steps = before
            raise EngineError("step: θ overflowed and was brought back; lower the learning rate")
        return loss

    def gradient(self, batch: Batch) -> Float32:
        """The loss's gradient."""
        check_batch(batch, self._shape, self._capacity)
        centre, weight = self._anchor
        gradient: Float32 = self._slope(batch)[1] + 2 * weight * (self._theta - centre)
        if not np.isfinite(gradient).all():
            raise EngineError("gradient: expected finite values; look at the batch")
        return gradient

    def _slope(self, batch: Batch) -> tuple[float, Float32]:
        """Loss and gradient of everything but the anchor."""
        n, classes = len(batch.labels), self._capacity
        logits = self.logits(batch.latents)
        log_p = _log_softmax(logits + batch.class_mask)
        chosen = np.eye(classes, dtype=np.float32)[batch.labels]
        losses = batch.ce_weight * -(chosen * log_p).sum(axis=1)
        slope = batch.ce_weight[:, None] * (np.exp(log_p) - chosen)
        terms = self._learner.loss
        if terms.target == "kl":
            softness: Any = np.float32(terms.temperature)
            wanted = _log_softmax(batch.target_logits / softness)
            absent = (batch.target_logits < MASKED / 2).astype(np.float32)
            got = _log_softmax((logits + absent * np.float32(MASKED)) / softness)
            distance = (np.exp(wanted) * (wanted - got)).sum(axis=1) * softness**2
            pull = (np.exp(got) - np.exp(wanted)) * softness
        else:
            away = logits - batch.target_logits
            distance, pull = np.square(away).mean(axis=1), away * np.float32(2 / classes)
        losses = losses + batch.target_weight * distance
        slope = (slope + batch.target_weight[:, None] * pull) / n
        gradient = np.concatenate([(slope.T @ batch.latents).reshape(-1), slope.sum(axis=0)])
        return float(losses.mean()), gradient.astype(np.float32)

    def _apply(self, gradient: Float32) -> None:
        learner = self._learner
        self._steps += 1
        if learner.optimizer == "sgd":
            move = learner.momentum * self._m + gradient + learner.weight_decay * self._theta
            self._m = move.astype(np.float32)
            self._theta = (self._theta - learner.learning_rate * self._m).astype(np.float32)
            return
        self._m = (_BETA1 * self._m + (1 - _BETA1) * gradient).astype(np.float32)
        self._v = (_BETA2 * self._v + (1 - _BETA2) * np.square(gradient)).astype(np.float32)
        m_hat = self._m / (1 - _BETA1**self._steps)
        v_hat = self._v / (1 - _BETA2**self._steps)
        rate, decay = learner.learning_rate, learner.weight_decay
        theta = self._theta * (1 - rate * decay) - rate * m_hat / (np.sqrt(v_hat) + _EPSILON)
        self._theta = theta.astype(np.float32)

    def state(self) -> EngineState:
        """A copy of θ and of the optimizer."""
        head = np.array([self._steps], "<i8").tobytes()
        return EngineState(self.theta, head + self._m.tobytes() + self._v.tobytes())

    def restore(self, state: EngineState) -> None:
        """Go back to a state, bit for bit."""
        theta = check_theta(state.theta, self._size)
        if len(state.optimizer) != 8 + 2 * 4 * self._size:
            raise EngineError(f"optimizer state: got {len(state.optimizer)} bytes")
        self._theta = theta
        moments = np.frombuffer(state.optimizer, "<f4", offset=8).copy()
        self._m, self._v = moments[: self._size], moments[self._size :]
        self._steps = int(np.frombuffer(state.optimizer, "<i8", count=1)[0])


def _log_softmax(logits: Float32) -> Float32:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Float32 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
