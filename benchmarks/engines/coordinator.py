"""Asks the engines in turn, so that whatever the machine does meanwhile hits all of them alike.

A B C, B C A, C A B: each engine does a few steps, then waits while the next one works. A ratio of
two engines is taken within each round and its median over the rounds.

Two threads that meet after every operator lose a hundredfold when another program takes one of
their cores, one thread does not: on a busy machine such a table would be a table of who has more
barriers. So a round in which an engine waited for a processor is repeated, whatever its times.
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
_DISTURBED = 0.05
_PATIENCE = 3


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
        disturbed: Whether there were too few rounds without others on the processors.
    """

    rounds_ms: dict[str, list[list[float]]] = field(default_factory=dict)
    ready_s: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    disturbed: bool = False

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
    quiet: list[Round] = []
    disturbed: list[Round] = []
    for i in range(_PATIENCE * plan.rounds):
        names = rotated([name for name in ready if name not in result.reasons], i)
        done = _round({name: ready[name] for name in names}, plan, result)
        if i == 0:
            whole = {name: loss for name, loss in done.losses.items() if ENGINES[name].whole}
            steps = 1 + plan.warmup + plan.steps
            _compare(result, whole, _LATER_TOLERANCE, f"step {steps}")
        (quiet if done.waited <= _DISTURBED else disturbed).append(done)
        hopeless = i + 1 >= plan.rounds and not quiet
        if len(quiet) == plan.rounds or hopeless:
            break
    rounds = [*quiet, *disturbed][: plan.rounds]
    result.disturbed = len(quiet) < plan.rounds
    for name in ready:
        if name not in result.reasons:
            result.rounds_ms[name] = [done.ms[name] for done in rounds]
    return result


@dataclass
class Round:
    """One turn of each engine.

    Attributes:
        ms: The step times.
        losses: At the last step.
        waited: The largest share of its time that an engine waited for a processor.
    """

    ms: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    waited: float = 0.0


def _round(workers: Mapping[str, Asked], plan: Plan, result: CaseResult) -> Round:
    done = Round()
    for name, worker in workers.items():
        time.sleep(_SETTLE_S)
        with _noting(result, name):
            answer = worker.ask("steps", count=plan.steps, warmup=plan.warmup)
            done.ms[name] = [ns / 1e6 for ns in answer["ns"]]
            done.losses[name] = answer["loss"]
            done.waited = max(done.waited, answer["waited_share"])
    return done


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
