"""The peer: onnxsim's ``compile_training_loop`` on the tail's forward graph and loss.

Its step has the forward pass, the loss, the gradient and Adam; its interface has no gradient
clipping over all parameters and its own Adam no weight decay, so its step does less. It also has
no option for threads: the runtime's own default is set instead.
"""

from __future__ import annotations

import zipfile
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxsim
from onnxsim.backend import Runner as Session

from benchmarks.engines.port import STUDENT, Arrays, Files, Pieces, Step


class Runner:
    """See :class:`benchmarks.engines.port.Runner`."""

    packages = ("onnxsim", "onnxruntime", "numpy")

    def __init__(self, engine: str, threads: int, files: Files) -> None:
        del engine
        self._files = files
        plain = onnxruntime.SessionOptions

        def options() -> Any:
            settings = plain()
            settings.intra_op_num_threads = threads
            return settings

        onnxruntime.SessionOptions = options

    def open(self, tail: str, batch: int) -> Step:
        """The compiled loop, called on numpy arrays."""
        batches = [_feeds(arrays) for arrays in self._files.batches(tail, batch)]
        loop = self._loop(tail, batch)
        return lambda i: loop(batches[i % len(batches)])

    def gemm(self) -> None:
        """Its runtime is that of the step graph."""

    def student(self) -> Pieces:
        """The backbone in a session of its own, the tail in a loop for one size of batch."""
        index = self._files.index()
        with zipfile.ZipFile(self._files.bundle(STUDENT)) as bundle:
            backbone = Session(bundle.read("backbone.onnx"), ["latents"])
        loop = self._loop(STUDENT, index["student_batch"])
        return Pieces(lambda x: backbone({"x": x})["latents"], lambda arrays: loop(_feeds(arrays)))

    def _loop(self, tail: str, batch: int) -> Any:
        model = onnx.load(self._files.peer(tail, batch))
        parameters = [t.name for t in model.graph.initializer if t.name.startswith("tail.")]
        loop = onnxsim.compile_training_loop(model, "loss", parameters)
        rate = self._files.index()["learner"]["learning_rate"]
        return lambda feeds: loop(feeds, rate)


def _feeds(arrays: Arrays) -> Arrays:
    """Labels become one-hot rows: its loss may only hold operators that it has gradients for."""
    feeds = dict(arrays)
    classes = feeds["class_mask"].shape[1]
    feeds["chosen"] = np.eye(classes, dtype=np.float32)[feeds.pop("labels")]
    return feeds
