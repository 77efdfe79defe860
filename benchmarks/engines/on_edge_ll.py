"""The project's engines by the project's own door: ``Bundle.open``, ``open_engine``, ``step``.

Everything that a device pays for is in the time: the check of the batch, the check for values
that are not finite, and θ that is only replaced after it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.engines.port import GEMM_SIZE, STUDENT, Files, Pieces, Step
from edge_ll.bundle import Bundle
from edge_ll.engine import Batch, Engine
from edge_ll.engine.load import open_engine
from edge_ll.engine.runtime import RuntimeOptions, open_session, run
from edge_ll.manifest import EngineName
from edge_ll.trust import TrustStore

_NAMES: dict[str, EngineName] = {"step_graph": "step-graph", "ort_training": "ort-training"}
_PACKAGES = {"step_graph": "onnxruntime", "ort_training": "onnxruntime-training-cpu"}


class Runner:
    """See :class:`benchmarks.engines.port.Runner`."""

    def __init__(self, engine: str, threads: int, files: Files) -> None:
        self.packages: tuple[str, ...] = (_PACKAGES[engine], "numpy")
        self._name = _NAMES[engine]
        self._threads = threads
        self._files = files

    def _engine(self, tail: str) -> Engine:
        trust = TrustStore.from_hex([self._files.index()["public_key"]])
        bundle = Bundle.open(self._files.bundle(tail), trust)
        return open_engine(bundle, self._name, threads=self._threads)

    def open(self, tail: str, batch: int) -> Step:
        """``Engine.step``."""
        engine = self._engine(tail)
        batches = [Batch(**arrays) for arrays in self._files.batches(tail, batch)]
        return lambda i: engine.step(batches[i % len(batches)])

    def gemm(self) -> Callable[[], object]:
        """One ``MatMul`` with the runtime's options of the engines."""
        options = RuntimeOptions(threads=self._threads)
        session = open_session("gemm", self._files.gemm().read_bytes(), options)
        a, b = np.random.default_rng(0).random((2, GEMM_SIZE, GEMM_SIZE), np.float32)
        return lambda: run(session, ["c"], {"a": a, "b": b})

    def student(self) -> Pieces:
        """An engine on the student's bundle."""
        engine = self._engine(STUDENT)
        return Pieces(engine.latents, lambda arrays: engine.step(Batch(**arrays)))
