"""The machine, and how much of it others used while we measured."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
from pathlib import Path
from typing import NamedTuple


class CpuUse(NamedTuple):
    """Seconds of CPU time so far."""

    all_s: float
    ours_s: float
    busy_s: float

    @classmethod
    def now(cls) -> CpuUse:
        """Of the whole machine, and of this process with its children that have ended."""
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields)
        ticks = os.sysconf("SC_CLK_TCK")
        busy = user + nice + system + irq + softirq + steal
        ours = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return cls(
            all_s=(busy + idle + iowait) / ticks,
            ours_s=sum(use.ru_utime + use.ru_stime for use in ours),
            busy_s=busy / ticks,
        )

    def others_share(self, since: CpuUse) -> float:
        """Of the machine's CPU time since then, the share that went to others."""
        others = (self.busy_s - since.busy_s) - (self.ours_s - since.ours_s)
        return max(0.0, others / max(self.all_s - since.all_s, 1e-9))


def waited_ns() -> int:
    """Nanoseconds that the threads of this process were ready to run, and others ran; so far.

    0 on a kernel that does not tell (no ``/proc/*/schedstat``).
    """
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread may end meanwhile
            total += int(path.read_text(encoding="ascii").split()[1])
    return total


def describe() -> dict[str, str | int]:
    """Processor, cores and operating system."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
            break
    return {
        "processor": name,
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.system(),
        "python": platform.python_version(),
    }
