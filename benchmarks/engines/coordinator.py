"""Asks the engines in turn, so that whatever the machine does meanwhile hits all of them alike.

A B C, B C A, C A B: each engine does a few steps, then waits while the next one works. A ratio of
two engines is taken within each round and its median over the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.engines.cases import ENGINES
from benchmarks.engines.process import Asked, EngineFailed

_SETTLE_S = 0.01  # threads of the engine before may still spin for a moment
_LOSS_TOLERANCE = 1e-3
_LATER_TOLERANCE = 1e-2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long each engine is measured.

    Attributes:
        rounds: How often each engine has its turn.
        steps: Measured steps in a turn.
        warmup: Steps before them, not measured: the engine before has taken the caches.
    """

    rounds: int = 10
    steps: int = 10
    warmup: int = 3


@dataclass
class CaseResult:
    """One tail with one size of batch on all engines.

    Attributes:
        rounds_ms: For each engine, the step times of each round.
        ready_s: Seconds from opening to the end of the first step, compilation included.
        reasons: For each engine that has no times, why.
    """

    rounds_ms: dict[str, list[list[float]]] = field(default_factory=dict)
    ready_s: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def ms(self, engine: str) -> float | None:
        """The median over all steps; None where it was not measured."""
        rounds = self.rounds_ms.get(engine)
        return median(time for times in rounds for time in times) if rounds else None

    def ratio(self, slow: str, fast: str) -> float | None:
        """The median over the rounds of the ratio of their medians."""
        slows, fasts = self.rounds_ms.get(slow), self.rounds_ms.get(fast)
        if not slows or not fasts:
            return None
        return median(median(a) / median(b) for a, b in zip(slows, fasts, strict=True))

    def faster(self, *engines: str) -> str | None:
        """Which of them has the smallest median; None where none was measured."""
        measured = {name: ms for name in engines if (ms := self.ms(name)) is not None}
        return min(measured, key=lambda name: measured[name]) if measured else None


def measure(workers: Mapping[str, Asked], tail: str, batch: int, plan: Plan) -> CaseResult:
    """One tail with one size of batch on all engines, in turn."""
    result, ready, losses = CaseResult(), {}, {}
    for name, worker in workers.items():
        with _noting(result, name):
            answer = worker.ask("open", tail=tail, batch=batch)
            result.ready_s[name], losses[name] = answer["ready_s"], answer["loss"]
            ready[name] = worker
    _compare(result, losses, _LOSS_TOLERANCE, "first step")
    for i in range(plan.rounds):
        losses = {}
        for name in rotated([name for name in ready if name not in result.reasons], i):
            time.sleep(_SETTLE_S)
            with _noting(result, name):
                answer = ready[name].ask("steps", count=plan.steps, warmup=plan.warmup)
                times = [ns / 1e6 for ns in answer["ns"]]
                result.rounds_ms.setdefault(name, []).append(times)
                losses[name] = answer["loss"]
        if i == 0:
            whole = {name: loss for name, loss in losses.items() if ENGINES[name].whole}
            done = 1 + plan.warmup + plan.steps
            _compare(result, whole, _LATER_TOLERANCE, f"step {done}")
    for name in result.reasons:
        result.rounds_ms.pop(name, None)
    return result


def rotated(names: list[str], by: int) -> list[str]:
    """The same names in turn, another one first each time."""
    cut = by % len(names) if names else 0
    return names[cut:] + names[:cut]


@contextmanager
def _noting(result: CaseResult, engine: str) -> Iterator[None]:
    """An engine's failure becomes a reason in the result."""
    try:
        yield
    except EngineFailed as failure:
        result.reasons[engine] = str(failure)


def _compare(result: CaseResult, losses: Mapping[str, float], tolerance: float, when: str) -> None:
    """An engine that computes something else has no time that could be compared."""
    if not losses:
        return
    usual = median(losses.values())
    for name, loss in losses.items():
        if not abs(loss - usual) <= tolerance * max(1.0, abs(usual)):
            result.reasons[name] = (
                f"its loss at the {when} is {loss:.4f}, of the others {usual:.4f}"
            )


def gemm_gflops(workers: Mapping[str, Asked]) -> dict[str, float]:
    """The peak of each runtime on a large product, in GFLOP/s."""
    peaks = {}
    for name, worker in workers.items():
        try:
            peak = worker.ask("gemm")["gflops"]
        except EngineFailed:
            continue
        if peak is not None:
            peaks[name] = float(peak)
    return peaks


def about(workers: Mapping[str, Asked]) -> dict[str, dict[str, Any]]:
    """What each engine's process says about its installation."""
    told = {}
    for name, worker in workers.items():
        try:
            told[name] = worker.ask("about")
        except EngineFailed as failure:
            told[name] = {"error": str(failure)}
    return told
