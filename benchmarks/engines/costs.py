"""What an engine costs beside time: memory while it learns, start, disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.engines.cases import ENGINES
from benchmarks.engines.port import Files
from benchmarks.engines.process import EngineFailed, Pythons, run_module

MEASURED = ("torch_fused", "step_graph", "ort_training", "onnxsim")
LONG = ("step_graph", "ort_training")


def costs(
    engines: Iterable[str],
    files: Files,
    pythons: Pythons,
    installed: Mapping[str, Mapping[str, Any]],
    *,
    steps: int,
    long_steps: int,
) -> dict[str, dict[str, Any]]:
    """For each engine MB resident after the steps, seconds to start, and MB on disk.

    Args:
        engines: Those that are measured; of torch only the fused optimizer.
        files: What was exported.
        pythons: The interpreters.
        installed: What each engine's process said about its packages.
        steps: Of learning before the memory is read.
        long_steps: Once more after so many, for the engines that devices run; 0 for not.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in (name for name in engines if name in MEASURED):
        marks = [steps, long_steps] if name in LONG and long_steps else [steps]
        python = pythons[ENGINES[name].environment]
        arguments = [name, str(files.folder), *map(str, marks)]
        try:
            measured = json.loads(run_module(python, files.folder, "memory", *arguments))
        except EngineFailed as failure:
            measured = {"error": str(failure)}
        told = installed.get(name, {})
        disk = told.get("disk_bytes")
        found[name] = {
            **measured,
            "disk_mb": None if disk is None else round(disk / 1e6, 1),
            "versions": told.get("versions"),
        }
    return found
