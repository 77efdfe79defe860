"""The two graphs that every engine runs alike: the backbone, and the tail for a given θ."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from edge_ll.bundle import BACKBONE, TAIL, Bundle
from edge_ll.engine.port import EngineInfo, Float32, Placement
from edge_ll.engine.runtime import (
    RuntimeOptions,
    open_session,
    placement,
    run,
    runtime_name,
)


class InferenceGraphs:
    """Sessions on ``backbone.onnx`` and ``tail.onnx``."""

    def __init__(self, bundle: Bundle, options: RuntimeOptions) -> None:
        self._backbone = open_session(BACKBONE, bundle.read(BACKBONE), options)
        self._tail = open_session(TAIL, bundle.read(TAIL), options)

    def info(self, engine: str, *training: Placement) -> EngineInfo:
        """What really runs: the backbone, and what an engine trains the tail with."""
        placements = (
            placement("backbone", self._backbone),
            placement("tail", self._tail),
            *training,
        )
        providers = dict.fromkeys(item.provider for item in placements)
        return EngineInfo(engine, ", ".join(providers), runtime_name(), placements)

    def latents(self, x: npt.NDArray[Any]) -> Float32:
        """Raw inputs [N, *input] to float32 [N, *latent]."""
        latents: Float32 = run(self._backbone, ["latents"], {"x": x})[0]
        return latents

    def logits(self, latents: Float32, theta: Float32) -> Float32:
        """Latents to float32 [N, C]."""
        logits: Float32 = run(self._tail, ["logits"], {"latents": latents, "theta": theta})[0]
        return logits
