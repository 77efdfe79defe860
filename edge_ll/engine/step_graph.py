"""The step-graph engine: training on any stock ONNX Runtime.

One graph computes loss, gradient and update: ``(batch, θ, m, v, hyper) -> (loss, norm, θ', m',
v')``. The state is replaced only after the results were found finite, so a failed step changes
nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edge_ll.bundle import STEP, Bundle
from edge_ll.engine.graphs import InferenceGraphs
from edge_ll.engine.port import (
    Batch,
    EngineInfo,
    EngineState,
    Float32,
    check_batch,
    check_theta,
)
from edge_ll.engine.runtime import RuntimeOptions, open_session, placement, run
from edge_ll.errors import EngineError

BETA1, BETA2 = 0.9, 0.999
EPSILON = 1e-6  # smaller values are lost when torch's exporter simplifies the graph
HYPER = "hyper"
OUTPUTS = ("loss", "norm", "theta_out", "m_out", "v_out")


class StepGraphEngine:
    """See :class:`edge_ll.engine.Engine`."""

    def __init__(self, bundle: Bundle, options: RuntimeOptions) -> None:
        manifest = bundle.manifest
        self._manifest = manifest
        self._graphs = InferenceGraphs(bundle, options)
        self._step = open_session(STEP, bundle.read(STEP), options)
        self._theta = bundle.theta()
        self._m = np.zeros_like(self._theta)
        self._v = np.zeros_like(self._theta)
        self._steps = 0

    @property
    def info(self) -> EngineInfo:
        """What really runs."""
        return self._graphs.info("step-graph", placement("step", self._step))

    @property
    def theta(self) -> Float32:
        """A copy of θ, float32 [P]."""
        return self._theta.copy()

    def set_theta(self, theta: Float32) -> None:
        """Replace θ; the optimizer starts anew."""
        self._theta = check_theta(theta, self._manifest.theta_size)
        self._m, self._v = np.zeros_like(self._theta), np.zeros_like(self._theta)
        self._steps = 0

    def latents(self, x: npt.NDArray[Any]) -> Float32:
        """Run the backbone."""
        return self._graphs.latents(x)

    def logits(self, latents: Float32) -> Float32:
        """Run the tail."""
        return self._graphs.logits(latents, self._theta)

    def step(self, batch: Batch) -> float:
        """One optimizer step."""
        manifest = self._manifest
        check_batch(batch, manifest.latent.shape, manifest.capacity)
        learner = manifest.learner
        hyper = (
            learner.learning_rate,
            learner.weight_decay,
            learner.clip_norm,
            learner.momentum,
            self._steps + 1,
        )
        feeds = {
            **batch._asdict(),
            "theta": self._theta,
            "m": self._m,
            "v": self._v,
            HYPER: np.array(hyper, np.float32),
        }
        loss, norm, theta, m, v = run(self._step, list(OUTPUTS), feeds)
        if not (np.isfinite(loss) and np.isfinite(norm) and np.isfinite(theta).all()):
            raise EngineError(
                f"step: loss {float(loss)}, gradient norm {float(norm)}; expected finite values. "
                "θ is unchanged; lower the learning rate or look at the batch"
            )
        self._theta, self._m, self._v = theta, m, v
        self._steps += 1
        return float(loss)

    def state(self) -> EngineState:
        """A copy of θ and of the optimizer's moments and step count."""
        head = np.array([self._steps], "<i8").tobytes()
        return EngineState(self.theta, head + self._m.tobytes() + self._v.tobytes())

    def restore(self, state: EngineState) -> None:
        """Go back to a state, bit for bit."""
        size = self._manifest.theta_size
        theta = check_theta(state.theta, size)
        expected = 8 + 2 * 4 * size
        if len(state.optimizer) != expected:
            raise EngineError(
                f"optimizer state: expected {expected} bytes, got {len(state.optimizer)}"
            )
        moments = np.frombuffer(state.optimizer, "<f4", offset=8).copy()
        self._theta, self._m, self._v = theta, moments[:size], moments[size:]
        self._steps = int(np.frombuffer(state.optimizer, "<i8", count=1)[0])
