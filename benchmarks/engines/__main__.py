"""``make bench-engines``: measure, print tables, and one JSON object as the last line."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from benchmarks.engines import machine, report
from benchmarks.engines.cases import BATCHES, ENGINES, TAILS
from benchmarks.engines.coordinator import Plan, about, gemm_gflops, measure
from benchmarks.engines.costs import costs
from benchmarks.engines.port import Files
from benchmarks.engines.process import Pythons, WorkerProcess, run_module
from benchmarks.engines.report import Timed

BUSY = 0.1
"""From this share of the machine on, others disturb the measurement."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; the defaults are the whole measurement."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    for environment, folder in {
        "server": ".venv",
        "device": ".venv-device",
        "device-ort": ".venv-device-ort",
        "onnxsim": ".venv-bench-onnxsim",
    }.items():
        parser.add_argument(
            f"--{environment}", type=Path, default=Path(folder, "bin/python"), metavar="PYTHON"
        )
    parser.add_argument("--tails", nargs="*", choices=list(TAILS), default=list(TAILS))
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--threads", nargs="*", type=int, default=[2, 1])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="measured in each round")
    parser.add_argument("--memory-steps", type=int, default=1_000)
    parser.add_argument("--long-steps", type=int, default=20_000, help="0 leaves them out")
    parser.add_argument("--no-int8", action="store_true", help="train no student for int8")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and print."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="edge-ll-bench-") as folder:
        found = bench(options, Path(folder))
    print(json.dumps(found))


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole measurement; each table is printed when it is ready."""
    started, before = time.monotonic(), machine.CpuUse.now()
    pythons: Pythons = {
        "server": options.server.absolute(),
        "device": options.device.absolute(),
        "device_ort": options.device_ort.absolute(),
        "onnxsim": options.onnxsim.absolute(),
    }
    _told(report.what_table())
    index = _exported(options, Files(folder), pythons)
    timed = {
        threads: _timed(options, threads, Files(folder), pythons) for threads in options.threads
    }
    spent = costs(
        options.engines,
        Files(folder),
        pythons,
        next(iter(timed.values())).installed,
        steps=options.memory_steps,
        long_steps=options.long_steps,
    )
    _told(report.cost_table(spent))
    _told(report.artifact_table(index["tails"]))
    reasons = report.reasons(timed, index["reasons"])
    _told(report.reasons_text(reasons))
    others = machine.CpuUse.now().others_share(before)
    found = report.summary(timed, spent, index) | {
        "int8": _int8(options, folder),
        "reasons": reasons,
        "machine": machine.describe(),
        "others_cpu_share": round(others, 3),
        "seconds": round(time.monotonic() - started),
    }
    _told(f"{found['seconds']} s; other processes used {100 * others:.0f} % of the machine")
    if others > BUSY:
        _told(
            "WARNING: the machine was busy: caches are shared even without a *. Repeat when idle."
        )
    return found


def _int8(options: argparse.Namespace, folder: Path) -> Any:
    if options.no_int8:
        return None
    return json.loads(run_module(options.server.absolute(), folder, "backbone_int8"))


def _exported(options: argparse.Namespace, files: Files, pythons: Pythons) -> dict[str, Any]:
    """Export once, for everybody; the index."""
    _told("exporting, takes about a minute")
    sizes = map(str, options.batches)
    arguments = [str(files.folder), "--batches", *sizes, "--tails", *options.tails]
    run_module(pythons["server"], files.folder, "export", *arguments)
    return files.index()


def _timed(options: argparse.Namespace, threads: int, files: Files, pythons: Pythons) -> Timed:
    """Step times of every tail and batch, the GEMM peaks, and what is installed."""
    plan = Plan(rounds=options.rounds, steps=options.steps)
    index = files.index()
    with ExitStack() as stack:
        workers = {}
        for name in options.engines:
            python = pythons[ENGINES[name].environment]
            worker = WorkerProcess(name, threads, files.folder, python)
            workers[name] = stack.enter_context(closing(worker))
        timed = Timed(installed=about(workers), gflops=gemm_gflops(workers))
        for tail in options.tails:
            failed = index["reasons"].get(tail, {})
            able = {name: worker for name, worker in workers.items() if name not in failed}
            timed.results[tail] = {}
            for batch in options.batches if tail in index["tails"] else []:
                timed.results[tail][batch] = measure(able, tail, batch, plan)
                sys.stderr.write(f"measured: {tail}, batch {batch}, threads {threads}\n")
    _told(report.times_table(timed, threads))
    _told(report.share_table(timed, index["tails"], threads))
    return timed


def _told(text: str) -> None:
    sys.stdout.write(text + "\n\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
