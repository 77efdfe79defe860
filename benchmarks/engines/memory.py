"""Memory of one engine that learns: ``python -m benchmarks.engines.memory ENGINE FOLDER STEPS...``.

A whole student: each step takes new waveforms through the DS-CNN backbone, mixes their latents
with replayed ones, and trains the tail. Prints one JSON object with the resident set size after
each of the given numbers of steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

STARTED = perf_counter()

import numpy as np  # noqa: E402 - what is imported from here on is timed

from benchmarks.engines.port import STUDENT, Files, make_runner  # noqa: E402

NEW = 8


def main() -> None:
    """Learn, and print."""
    engine, folder, *marks = sys.argv[1:]
    print(json.dumps(measure(engine, Files(Path(folder)), [int(mark) for mark in marks])))


def measure(engine: str, files: Files, marks: list[int]) -> dict[str, Any]:
    """Seconds to import and to load, and MB resident after each of ``marks`` steps."""
    runner = make_runner(engine, 1, files)
    imported = perf_counter()
    latents, step = runner.student()
    loaded = perf_counter()
    waveforms = np.load(files.waveforms())
    batches = files.batches(STUDENT, files.index()["student_batch"])
    resident: dict[str, float] = {}
    loss = 0.0
    for i in range(1, max(marks) + 1):
        batch = batches[i % len(batches)]
        first = NEW * i % len(waveforms)
        batch["latents"][:NEW] = latents(waveforms[first : first + NEW])
        loss = step(batch)
        if i in marks:
            resident[str(i)] = round(_status_mb("VmRSS"), 1)
    if not np.isfinite(loss):
        raise ArithmeticError(f"{engine}: the loss became {loss}")
    return {
        "import_s": round(imported - STARTED, 3),
        "load_s": round(loaded - imported, 3),
        "rss_mb": resident,
        "peak_mb": round(_status_mb("VmHWM"), 1),
        "ms_per_step": round((perf_counter() - loaded) / max(marks) * 1e3, 3),
    }


def _status_mb(field: str) -> float:
    """A field of this process's status in MB (10^6 bytes)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {field}; memory can be measured on Linux only")


if __name__ == "__main__":
    main()
