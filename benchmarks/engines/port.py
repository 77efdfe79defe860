"""What an engine's process must be able to do, and the files that all of them read."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.engines.cases import ENGINES, VARIANTS

Arrays = dict[str, npt.NDArray[Any]]

Step = Callable[[int], float]
"""One whole training step on the batch of this number; the loss before it."""

GEMM_SIZE = 1024
REASON_CHARS = 300
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
STUDENT = "student"
"""The bundle with a whole student: what the memory is measured with."""


class Pieces(NamedTuple):
    """A whole student on an engine."""

    latents: Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]
    step: Callable[[Arrays], float]


class Runner(Protocol):
    """One engine in its own process.

    Attributes:
        packages: What must be installed for it, beside the project itself.
    """

    packages: tuple[str, ...]

    def open(self, tail: str, batch: int) -> Step:
        """Get ready to train a tail on batches of this size."""
        ...

    def gemm(self) -> Callable[[], object] | None:
        """A float32 product of two square matrices of :data:`GEMM_SIZE`, ready to be run."""
        ...

    def student(self) -> Pieces:
        """Open the bundle :data:`STUDENT`."""
        ...


@dataclass(frozen=True)
class Files:
    """The folder that the export fills and every process reads."""

    folder: Path

    def index(self) -> dict[str, Any]:
        """What was exported: keys, sizes, work of a step, and what failed and why."""
        decoded: dict[str, Any] = json.loads((self.folder / "index.json").read_text("utf-8"))
        return decoded

    def bundle(self, tail: str) -> Path:
        """The signed bundle of a tail."""
        return self.folder / f"{tail}.bundle"

    def theta(self, tail: str) -> Path:
        """The same θ as in the bundle, float32."""
        return self.folder / f"{tail}.theta.npy"

    def peer(self, tail: str, batch: int) -> Path:
        """The forward graph of a tail with its loss, all shapes fixed, for the peer."""
        return self.folder / f"{tail}-{batch}.peer.onnx"

    def gemm(self) -> Path:
        """A graph of one matrix product."""
        return self.folder / "gemm.onnx"

    def waveforms(self) -> Path:
        """Inputs of the student, int16 [n, samples]."""
        return self.folder / "waveforms.npy"

    def stored_batches(self, tail: str, batch: int) -> Path:
        """The file behind :meth:`batches`."""
        return self.folder / f"{tail}-{batch}.npz"

    def batches(self, tail: str, batch: int) -> list[Arrays]:
        """The batches that every engine trains on, by the names of their tensors."""
        with np.load(self.stored_batches(tail, batch)) as stored:
            whole = dict(stored)
        return [{name: array[i] for name, array in whole.items()} for i in range(VARIANTS)]


def reason(error: BaseException) -> str:
    """One line that says why something failed: the error, and the cause at its root."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    chain = [error] if root is error else [error, root]
    lines = (str(each).strip().splitlines() or [type(each).__name__] for each in chain)
    return _COLOUR.sub("", "; ".join(line[0] for line in lines))[:REASON_CHARS]


def make_runner(engine: str, threads: int, files: Files) -> Runner:
    """The engine of this process; its libraries are imported here."""
    module = importlib.import_module(f"benchmarks.engines.{ENGINES[engine].module}")
    runner: Runner = module.Runner(engine, threads, files)
    return runner
