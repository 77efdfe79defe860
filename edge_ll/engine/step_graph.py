"""The step-graph engine: training on any stock ONNX Runtime.

One graph computes loss, gradient and update: ``(batch, θ, m, v, hyper) -> (loss, norm, θ', m',
v')``. The state lies twice where the runtime computes: a step reads one copy and writes the other
(one value may not be input and output at once), and they change places only after the results were
found finite. So a failed step changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edge_ll.bundle import PROJECTED_STEP, STEP, Bundle
from edge_ll.engine.graphs import InferenceGraphs
from edge_ll.engine.port import (
    Batch,
    EngineInfo,
    EngineState,
    Float32,
    check_anchor,
    check_batch,
    check_reference,
    check_theta,
)
from edge_ll.engine.runtime import RuntimeOptions, open_session, placement, run
from edge_ll.errors import EngineError
from edge_ll.manifest import LearnerDefaults

BETA1, BETA2 = 0.9, 0.999
EPSILON = 1e-6  # smaller values are lost when torch's exporter simplifies the graph
HYPER = "hyper"
REFERENCE = "reference_"  # before the names of the second batch of a projected step
OUTPUTS = ("loss", "norm", "theta_out", "m_out", "v_out")

_NO_CLIP = float(np.finfo(np.float32).max)


def hyper_parameters(learner: LearnerDefaults, count: int) -> Float32:
    """What the graph's input ``hyper`` holds at step ``count``, from 1: float32 [5].

    AdamW: step size, what is kept of θ, clip norm, unused, epsilon; bias correction and decay are
    folded in, as in algorithm 1's last remark of Kingma and Ba, ICLR 2015. SGD: learning rate,
    weight decay, clip norm, momentum, unused.
    """
    rate, decay, clip = learner.learning_rate, learner.weight_decay, learner.clip_norm
    if learner.optimizer == "sgd":
        return np.array([rate, decay, clip, learner.momentum, 0.0], np.float32)
    root = float(np.sqrt(1 - BETA2**count))
    return np.array(
        [rate * root / (1 - BETA1**count), 1 - rate * decay, clip, 0.0, EPSILON * root],
        np.float32,
    )


class StepGraphEngine:
    """See :class:`edge_ll.engine.Engine`."""

    def __init__(self, bundle: Bundle, options: RuntimeOptions) -> None:
        self._manifest = bundle.manifest
        self._graphs = InferenceGraphs(bundle, options)
        terms, size = self._manifest.learner.loss, self._manifest.theta_size
        if len(self._manifest.latent.shape) == 1:
            # The operators of a tail on flat latents are over before a second thread is awake.
            options = msgspec.structs.replace(options, threads=1)
        names = (STEP, PROJECTED_STEP) if terms.projection else (STEP,)
        sessions = [open_session(name, bundle.read(name), options) for name in names]
        where = {session.get_providers()[0] for session in sessions}
        if len(where) > 1:
            raise EngineError(
                f"{' and '.join(names)} share one state, but run on {' and '.join(sorted(where))}; "
                "name a provider that takes both"
            )
        anchor_names = ("anchor_centre", "anchor_weight") if terms.anchor else ()
        try:
            self._sides = _Side.new(sessions[0], size), _Side.new(sessions[0], size)
            self._anchor = {
                name: _place(sessions[0], np.zeros(size, np.float32)) for name in anchor_names
            }
            bound = [_BoundStep(session, self._sides, self._anchor) for session in sessions]
        except Exception as error:  # the runtime's exceptions share no base
            raise EngineError(f"{STEP} does not fit the manifest: {error}") from error
        self._step, self._projected = bound[0], bound[-1]
        self._now = 0
        self._steps = 0
        self.set_theta(bundle.theta())
        self._info = self._graphs.info(
            "step-graph",
            *(
                placement(name.removesuffix(".onnx"), s)
                for name, s in zip(names, sessions, strict=True)
            ),
        )

    @property
    def info(self) -> EngineInfo:
        """What really runs."""
        return self._info

    @property
    def theta(self) -> Float32:
        """A copy of θ, float32 [P]."""
        return self._theta.copy()

    @property
    def _theta(self) -> Float32:
        """θ where it lies; on the CPU without a copy."""
        theta: Float32 = self._sides[self._now].theta.numpy()
        return theta

    def set_theta(self, theta: Float32) -> None:
        """Replace θ; the optimizer starts anew."""
        checked = check_theta(theta, self._manifest.theta_size)
        self._write(checked, np.zeros_like(checked), np.zeros_like(checked), steps=0)

    def set_anchor(self, centre: Float32, weight: Float32) -> None:
        """Hold θ near a centre."""
        manifest = self._manifest
        checked = check_anchor(manifest.learner.loss, centre, weight, manifest.theta_size)
        for value, vector in zip(self._anchor.values(), checked, strict=True):
            value.update_inplace(vector)

    def latents(self, x: npt.NDArray[Any]) -> Float32:
        """Run the backbone."""
        return self._graphs.latents(x)

    def logits(self, latents: Float32) -> Float32:
        """Run the tail."""
        return self._graphs.logits(latents, self._theta)

    def step(self, batch: Batch, reference: Batch | None = None) -> float:
        """One optimizer step."""
        feeds = self._feeds(batch)
        step = self._step
        if reference is not None:
            feeds |= self._reference_feeds(reference)
            step = self._projected
        feeds[HYPER] = hyper_parameters(self._manifest.learner, self._steps + 1)
        loss, norm = step.run(feeds, self._now)
        theta = self._sides[1 - self._now].theta.numpy()
        if not (math.isfinite(loss) and math.isfinite(norm) and _is_finite(theta)):
            raise EngineError(
                f"step: loss {loss}, gradient norm {norm}; expected finite values, in θ as well. "
                "θ is unchanged; lower the learning rate or look at the batch"
            )
        self._now = 1 - self._now
        self._steps += 1
        return loss

    def gradient(self, batch: Batch) -> Float32:
        """The loss's gradient: without a past, the optimizer's first moment is a share of it."""
        learner, theta = self._manifest.learner, self._theta
        zero = np.zeros_like(theta)
        hyper = np.array([0.0, 0.0, _NO_CLIP, 0.0, EPSILON], np.float32)
        anchor = {name: value.numpy() for name, value in self._anchor.items()}
        feeds = {**self._feeds(batch), **anchor, "theta": theta, "m": zero, "v": zero, HYPER: hyper}
        norm, moment = run(self._step.session, ["norm", "m_out"], feeds)
        if not np.isfinite(norm):  # it clips even where it is not wanted
            raise EngineError(
                f"gradient: its norm is {norm}, expected a finite one; look at the batch"
            )
        share = np.float32(1 - BETA1 if learner.optimizer == "adamw" else 1)
        gradient: Float32 = moment / share
        return gradient

    def state(self) -> EngineState:
        """A copy of θ and of the optimizer's moments and step count."""
        side = self._sides[self._now]
        head = np.array([self._steps], "<i8").tobytes()
        return EngineState(self.theta, head + side.m.numpy().tobytes() + side.v.numpy().tobytes())

    def restore(self, state: EngineState) -> None:
        """Go back to a state, bit for bit."""
        size = self._manifest.theta_size
        theta = check_theta(state.theta, size)
        expected = 8 + 2 * 4 * size
        if len(state.optimizer) != expected:
            raise EngineError(
                f"optimizer state: expected {expected} bytes, got {len(state.optimizer)}"
            )
        moments = np.frombuffer(state.optimizer, "<f4", offset=8).astype(np.float32)
        steps = int(np.frombuffer(state.optimizer, "<i8", count=1)[0])
        self._write(theta, moments[:size], moments[size:], steps=steps)

    def _write(self, theta: Float32, m: Float32, v: Float32, *, steps: int) -> None:
        for value, vector in zip(self._sides[self._now], (theta, m, v), strict=True):
            value.update_inplace(np.ascontiguousarray(vector))
        self._steps = steps

    def _feeds(self, batch: Batch) -> dict[str, npt.NDArray[Any]]:
        check_batch(batch, self._manifest.latent.shape, self._manifest.capacity)
        return batch._asdict()

    def _reference_feeds(self, reference: Batch) -> dict[str, npt.NDArray[Any]]:
        manifest = self._manifest
        terms = manifest.learner.loss
        check_reference(terms, reference, manifest.latent.shape, manifest.capacity)
        return {REFERENCE + name: value for name, value in reference._asdict().items()}


class _Side(NamedTuple):
    """One copy of the state, as values of the runtime."""

    theta: Any
    m: Any
    v: Any

    @classmethod
    def new(cls, session: Any, size: int) -> _Side:
        return cls(*(_place(session, np.zeros(size, np.float32)) for _ in cls._fields))


class _BoundStep:
    """A step's session, bound to the state in both directions once and for all."""

    def __init__(self, session: Any, sides: tuple[_Side, _Side], anchor: Mapping[str, Any]) -> None:
        self.session = session
        self._loss, self._norm = np.zeros((), np.float32), np.zeros((), np.float32)
        first, second = sides
        self._bindings = [self._bind(first, second, anchor), self._bind(second, first, anchor)]

    def _bind(self, read: _Side, written: _Side, anchor: Mapping[str, Any]) -> Any:
        binding = self.session.io_binding()
        inputs = {**dict(zip(("theta", "m", "v"), read, strict=True)), **anchor}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        scalars = [ort.OrtValue.ortvalue_from_numpy(a) for a in (self._loss, self._norm)]
        for name, value in zip(OUTPUTS, [*scalars, *written], strict=True):
            binding.bind_ortvalue_output(name, value)
        return binding

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], side: int) -> tuple[float, float]:
        """Loss and gradient norm of the step that reads ``side`` and writes the other one.

        Raises:
            EngineError: The runtime failed.
        """
        binding = self._bindings[side]
        try:
            for name, value in feeds.items():
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            self.session.run_with_iobinding(binding)
        except Exception as error:  # the runtime's exceptions share no base
            raise EngineError(f"step: {error}") from error
        return float(self._loss), float(self._norm)


def _is_finite(vector: Float32) -> bool:
    """Whether all values are: one that is not makes the sum so; one pass, no copy."""
    return math.isfinite(float(vector.sum()))


def _place(session: Any, array: Float32) -> Any:
    """An array as a value of the runtime, on the device where the session computes."""
    device = "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
    return ort.OrtValue.ortvalue_from_numpy(array, device, 0)
