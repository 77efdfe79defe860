"""An engine in numpy alone, for tests and for machines without a runtime: a linear tail.

Its backbone flattens the input; θ is ``weight [C, D]`` then ``bias [C]``. It computes the same loss
and the same AdamW step as the graphs do, and passes the same contract suite.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edge_ll.engine.port import (
    Batch,
    EngineInfo,
    EngineState,
    Float32,
    check_batch,
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

    def step(self, batch: Batch) -> float:
        """One AdamW step on weighted cross-entropy and logit distance."""
        check_batch(batch, self._shape, self._capacity)
        n = len(batch.labels)
        logits = self.logits(batch.latents)
        masked = logits + batch.class_mask
        shifted = masked - masked.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        chosen = np.eye(self._capacity, dtype=np.float32)[batch.labels]
        away = logits - batch.target_logits
        losses = batch.ce_weight * -(chosen * log_p).sum(axis=1)
        losses = losses + batch.target_weight * np.square(away).mean(axis=1)
        slope = batch.ce_weight[:, None] * (np.exp(log_p) - chosen)
        slope = slope + batch.target_weight[:, None] * 2 * away / self._capacity
        slope /= n
        gradient = np.concatenate([(slope.T @ batch.latents).reshape(-1), slope.sum(axis=0)])
        loss, norm = float(losses.mean()), float(np.sqrt(np.square(gradient).sum()))
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise EngineError(f"step: loss {loss}, gradient norm {norm}; expected finite values")
        clip = self._learner.clip_norm
        self._apply((gradient * (clip / max(norm, clip))).astype(np.float32))
        return loss

    def _apply(self, gradient: Float32) -> None:
        self._steps += 1
        self._m = (_BETA1 * self._m + (1 - _BETA1) * gradient).astype(np.float32)
        self._v = (_BETA2 * self._v + (1 - _BETA2) * np.square(gradient)).astype(np.float32)
        m_hat = self._m / (1 - _BETA1**self._steps)
        v_hat = self._v / (1 - _BETA2**self._steps)
        rate, decay = self._learner.learning_rate, self._learner.weight_decay
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
