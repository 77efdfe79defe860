"""One engine in a process of its own: does what a line of JSON asks for, and waits meanwhile.

``python -m benchmarks.engines.worker ENGINE THREADS FOLDER``. Requests come in on standard input:

| request | answer |
|---|---|
| ``{"do": "about"}`` | versions, and bytes on disk with everything that is needed |
| ``{"do": "open", "tail": t, "batch": n}`` | seconds until the first step was done, its loss |
| ``{"do": "steps", "count": k, "warmup": w}`` | nanoseconds of each of k steps, last loss, wait |
| ``{"do": "gemm"}`` | GFLOP/s of a large product, or null |

The wait is the share of the steps' time in which threads were ready and others had the processors.
Whatever fails is answered with ``{"error": reason}``. Libraries that print do so on standard error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from functools import cached_property
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any, TextIO

from benchmarks.engines.installed import disk_bytes, versions
from benchmarks.engines.machine import waited_ns
from benchmarks.engines.port import GEMM_SIZE, Files, Runner, Step, make_runner, reason

_GEMM_RUNS = 20


class Worker:
    """Answers requests for one engine."""

    def __init__(self, engine: str, threads: int, files: Files) -> None:
        self._engine, self._threads, self._files = engine, threads, files
        self._step: Step | None = None
        self._done = 0

    @cached_property
    def _runner(self) -> Runner:
        return make_runner(self._engine, self._threads, self._files)

    def about(self) -> dict[str, Any]:
        """What is installed for it."""
        needed = self._runner.packages
        return {"versions": versions(needed), "disk_bytes": disk_bytes(needed)}

    def open(self, *, tail: str, batch: int) -> dict[str, Any]:
        """Get ready, and do one step: some engines build theirs only then."""
        self._step = None
        started = perf_counter()
        step = self._runner.open(tail, batch)
        loss = step(0)
        self._step, self._done = step, 1
        return {"ready_s": perf_counter() - started, "loss": loss}

    def steps(self, *, count: int, warmup: int) -> dict[str, Any]:
        """Steps one after the other; the first ones warm the caches and are not in the answer."""
        if self._step is None:
            raise RuntimeError("no tail is open")
        step, first = self._step, self._done + warmup
        loss, times = 0.0, []
        gc.collect()
        gc.disable()
        try:
            for i in range(self._done, first):
                step(i)
            waited = waited_ns()
            for i in range(first, first + count):
                began = perf_counter_ns()
                loss = step(i)
                times.append(perf_counter_ns() - began)
            waited = waited_ns() - waited
        finally:
            gc.enable()
        self._done += warmup + count
        share = waited / (sum(times) * self._threads)
        return {"ns": times, "loss": loss, "waited_share": share}

    def gemm(self) -> dict[str, Any]:
        """The best of some runs: a peak."""
        product = self._runner.gemm()
        if product is None:
            return {"gflops": None}
        times = []
        for _ in range(_GEMM_RUNS):
            began = perf_counter()
            product()
            times.append(perf_counter() - began)
        return {"gflops": 2 * GEMM_SIZE**3 / min(times) / 1e9}


def main() -> None:
    """Answer until standard input ends."""
    engine, threads, folder = sys.argv[1:]
    answers = _private_stdout()
    worker = Worker(engine, int(threads), Files(Path(folder)))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001 - libraries raise many kinds; all are answers
            answer = {"error": reason(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _private_stdout() -> TextIO:
    """Standard output for answers alone; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main()
