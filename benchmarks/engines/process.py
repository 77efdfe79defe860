"""A process that answers requests, and how the coordinator talks to it."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from benchmarks.engines.cases import Environment

Pythons = Mapping[Environment, Path]
"""The interpreter of each environment."""

ROOT = Path(__file__).parents[2]

_ANSWER_S = 300.0


class EngineFailed(Exception):  # noqa: N818 - not an error of the benchmark: a result
    """An engine cannot do what it was asked; the text says why."""


class Asked(Protocol):
    """A process that answers requests."""

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Its answer.

        Raises:
            EngineFailed: The answer is an error, or the process has died or is silent.
        """
        ...


class WorkerProcess:
    """An engine's process (:mod:`benchmarks.engines.worker`), asked through pipes."""

    def __init__(self, engine: str, threads: int, folder: Path, python: Path) -> None:
        self._log = folder / f"{engine}-{threads}.log"
        command = [python, "-m", "benchmarks.engines.worker", engine, str(threads), folder]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=environment(folder, threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """See :class:`Asked`."""
        stdin, stdout = _pipe(self._process.stdin), _pipe(self._process.stdout)
        try:
            stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            stdin.flush()
        except OSError as error:
            raise EngineFailed(f"its process has ended; see {self._last_words()}") from error
        readable, _, _ = select.select([stdout], [], [], _ANSWER_S)
        line = stdout.readline() if readable else b""
        if not line:
            self._process.kill()
            what = "has ended" if readable else f"gave no answer in {_ANSWER_S:.0f} s"
            raise EngineFailed(f"its process {what}: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        _pipe(self._process.stdin).close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _pipe(self._process.stdout).close()

    def _last_words(self) -> str:
        return _last_line(self._log.read_text("utf-8", errors="replace"))


def environment(folder: Path, threads: int) -> dict[str, str]:
    """For a child process: this checkout first, as many threads, compiled code in the folder."""
    paths = [ROOT, ROOT / "export", ROOT / "device"]
    count = str(threads)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }


def run_module(python: Path, folder: Path, module: str, *arguments: str) -> str:
    """Run one of our modules to its end; the last line that it printed.

    Raises:
        EngineFailed: It failed; what it said last.
    """
    try:
        done = subprocess.run(
            [str(python), "-m", f"benchmarks.engines.{module}", *arguments],
            cwd=ROOT,
            env=environment(folder, 1),
            capture_output=True,
            text=True,
            check=True,
        )
    except OSError as error:
        raise EngineFailed(f"{python}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise EngineFailed(_last_line(error.stderr)) from error
    return _last_line(done.stdout)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it left no message"


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise RuntimeError("the process was started without this pipe")
    return pipe
