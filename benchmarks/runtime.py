"""What the runtime's options cost: time and processor time of a step, and resident memory.

    python -m benchmarks.runtime my.bundle --trust key.pub

Each case runs in a process of its own, with the calls that an agent makes: batches of changing
sizes through the backbone, training steps, the tail on more latents now and then. Other work on
the machine only makes a call slower: the times are those that a tenth of the calls stay below, in
the fastest of several interleaved rounds. Needs the extra ``device`` alone; reads memory from
/proc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_ll.bundle import Bundle
from edge_ll.engine import plain_batch, runtime
from edge_ll.engine.load import open_engine
from edge_ll.quantize import LatentQuantizer
from edge_ll.trust import TrustStore

STATUS = Path("/proc/self/status")


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """Options of the engine, and settings that the project does not offer.

    Attributes:
        name: For the table.
        options: Of :func:`edge_ll.engine.load.open_engine`.
        settings: Attributes of ONNX Runtime's SessionOptions.
        entries: Its configuration entries.
        environment: Variables of the process.
    """

    name: str
    options: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    entries: dict[str, str] = {}
    environment: dict[str, str] = {}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of a case measured; memory in bytes."""

    name: str
    step_ms: float
    step_cpu_ms: float
    backbone_ms: float
    opened: int
    after_1000: int
    at_end: int
    peak: int
    threads: int


OWN_POOL = {"session.use_env_allocators": "0"}
CASES = (
    Case(name="default"),
    Case(name="no arena", options={"arena": False}),
    Case(name="arena of 16 MiB", options={"arena_limit_bytes": 1 << 24}),
    Case(name="an arena per graph", entries=OWN_POOL),
    Case(name="memory pattern", settings={"enable_mem_pattern": True}),
    Case(
        name="an arena per graph, memory pattern",
        settings={"enable_mem_pattern": True},
        entries=OWN_POOL,
    ),
    Case(name="no prepacking", entries={"session.disable_prepacking": "1"}),
    Case(name="2 threads", options={"threads": 2}),
    Case(name="2 threads, spinning", options={"threads": 2, "spinning": True}),
    Case(name="telemetry", environment={"ORT_DISABLE_TELEMETRY": "0"}),
)


def resident(field: str) -> int:
    """A field of the process's status in bytes: VmRSS now, VmHWM at most, ever."""
    text = STATUS.read_text("ascii")
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def measure(bundle_path: Path, key: Path, case: Case, steps: int) -> Row:
    """Open the bundle and learn, as a case says."""
    usual = runtime.session_options

    def changed(options: runtime.RuntimeOptions) -> Any:
        settings = usual(options)
        for name, value in case.settings.items():
            setattr(settings, name, value)
        for name, value in case.entries.items():
            settings.add_session_config_entry(name, value)
        return settings

    runtime.session_options = changed
    bundle = Bundle.open(bundle_path, TrustStore.from_file(key))
    engine = open_engine(bundle, **case.options)
    opened = resident("VmRSS")
    manifest = bundle.manifest
    quantizer = LatentQuantizer(bundle.array("latent_scale"), bundle.array("latent_zero"))
    latents = quantizer.decode(bundle.array("anchor_latents"))
    labels, mask = bundle.array("anchor_labels"), np.zeros(manifest.capacity, np.float32)
    x = np.zeros((8, *manifest.input.shape), manifest.input.dtype)
    clocks: dict[str, list[float]] = {"step": [], "cpu": [], "backbone": []}
    after_1000 = 0
    for i in range(steps):
        n = manifest.learner.batch_replay + 1 + i % manifest.learner.batch_new
        batch = plain_batch(latents[:n], labels[:n], mask)
        wall, cpu = time.perf_counter(), time.process_time()
        engine.step(batch)
        if i < 2000:
            clocks["step"].append(time.perf_counter() - wall)
            clocks["cpu"].append(time.process_time() - cpu)
        if i % 8 == 0:
            wall = time.perf_counter()
            engine.latents(x[: 1 + i // 8 % 8])
            if i < 2000 and i // 8 % 8 == 7:
                clocks["backbone"].append(time.perf_counter() - wall)
        if i % 64 == 0:
            engine.logits(latents)
        if i == 999:
            after_1000 = resident("VmRSS")
    fast = {name: sorted(values)[len(values) // 10] * 1e3 for name, values in clocks.items()}
    return Row(
        name=case.name,
        step_ms=fast["step"],
        step_cpu_ms=fast["cpu"],
        backbone_ms=fast["backbone"],
        opened=opened,
        after_1000=after_1000,
        at_end=resident("VmRSS"),
        peak=resident("VmHWM"),
        threads=len(list(Path("/proc/self/task").iterdir())),
    )


def run_case(bundle: Path, key: Path, case: Case, steps: int) -> Row:
    """Measure a case in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, str(bundle), "--trust", str(key)]
    command += ["--steps", str(steps), "--worker", msgspec.json.encode(case).decode()]
    done = subprocess.run(  # this very module
        command, env=os.environ | case.environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Row)


def best(rows: list[Row]) -> Row:
    """Of several runs the fastest times and the largest memory."""
    fast = {name: min(getattr(row, name) for row in rows) for name in TIMES}
    large = {name: max(getattr(row, name) for row in rows) for name in MEMORY}
    return Row(name=rows[0].name, threads=rows[0].threads, **fast, **large)


TIMES = ("step_ms", "step_cpu_ms", "backbone_ms")
MEMORY = ("opened", "after_1000", "at_end", "peak")


def main() -> None:
    """Print a table, and one JSON object as the last line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--trust", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--provider", action="append", help="measure these, instead of the options")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    say = sys.stdout.write
    if given.worker:
        case = msgspec.json.decode(given.worker, type=Case)
        row = measure(given.bundle, given.trust, case, given.steps)
        say(msgspec.json.encode(row).decode() + "\n")
        return
    cases: tuple[Case, ...] = CASES
    if given.provider:
        cases = tuple(Case(name=p, options={"providers": [p]}) for p in given.provider)
    rounds = [
        [run_case(given.bundle, given.trust, case, given.steps) for case in cases]
        for _ in range(given.rounds)
    ]
    rows = [best(list(runs)) for runs in zip(*rounds, strict=True)]
    titles = ("step", "its CPU", "backbone", "opened", "1,000", "end", "peak", "threads")
    say(f"{'':36}" + "".join(f"{title:>10}" for title in titles) + "\n")
    for row in rows:
        times = "".join(f"{getattr(row, name):8.3f}ms" for name in TIMES)
        memory = "".join(f"{getattr(row, name) / 2**20:7.1f}MiB" for name in MEMORY)
        say(f"{row.name:36}{times}{memory}{row.threads:10}\n")
    say(json.dumps({"steps": given.steps, "rows": msgspec.to_builtins(rows)}) + "\n")


if __name__ == "__main__":
    main()
