"""Agents as operating-system processes, in the device's own virtual environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from edge_ll.errors import EdgeLLError, EngineError

_STOP_S = 10.0
_TAIL_LINES = 5

VENVS = {"step-graph": Path(".venv-device"), "ort-training": Path(".venv-device-ort")}


class AgentError(EdgeLLError):
    """An agent's process could not be started, or ended by itself."""


def device_python(engine: str, chosen: Path | None) -> Path:
    """The interpreter that agents run in.

    Each of the two runtimes has an environment of its own, without torch: they share a package
    name, and one environment holds one of them.

    Raises:
        EngineError: There is none; says how to make it.
    """
    if chosen is None:
        chosen = VENVS[engine] / "bin" / "python"
    if not chosen.exists():
        raise EngineError(
            f"{chosen} does not exist; make it with `make {VENVS[engine].name[1:]}`, or name an "
            "interpreter that has edge-ll[device] (or [device-ort-training]) with --device-python"
        )
    return chosen.absolute()


class AgentProcess:
    """One agent.

    Args:
        python: The interpreter.
        config: The agent's TOML file.
        log_file: Where its log lines go.
    """

    def __init__(self, python: Path, config: Path, log_file: Path) -> None:
        self._log_file = log_file
        self.name = config.stem
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603  (our own module, our own arguments)
                [python, "-m", "edge_ll_device.cli", "run", "--config", config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
            )

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def check(self) -> None:
        """Raise if it ended by itself.

        Raises:
            AgentError: With the end of its log.
        """
        code = self._process.poll()
        if code is not None:
            lines = self._log_file.read_text("utf-8", "replace").splitlines()[-_TAIL_LINES:]
            raise AgentError(f"{self.name} ended with {code}:\n  " + "\n  ".join(lines))

    def has_torch(self) -> bool | None:
        """Whether torch's library is mapped into the process; None where that cannot be seen."""
        try:
            return "libtorch" in Path(f"/proc/{self.pid}/maps").read_text("utf-8", "replace")
        except OSError:
            return None

    def stop(self) -> None:
        """Ask it to end; insist after a while."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def write_config(
    path: Path, *, device: str, seed: int, tenant: str, broker: str, trusted_key: str, engine: str
) -> None:
    """An agent's TOML file; its stream and state lie beside it under the device's name.

    TOML's basic strings are written as JSON's.
    """
    tables: dict[str, dict[str, object]] = {
        "": {
            "device": device,
            "tenant": tenant,
            "state_dir": str(path.with_name(device)),
            "trusted_keys": [trusted_key],
            "report_every_samples": 10,
        },
        "broker": {"url": broker},
        "runtime": {"engine": engine},
        "learning": {"seed": seed},
        "stream": {"file": str(path.with_name(f"{device}.npz"))},
    }
    lines = []
    for name, table in tables.items():
        lines += [f"\n[{name}]"] if name else []
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def learn_naively(
    python: Path, bundle: Path, key: Path, streams: Sequence[Path], *, engine: str
) -> list[dict[str, object]]:
    """The same streams learned without replay, one process each, at the same time.

    Raises:
        AgentError: One of them failed.
    """
    processes = [
        subprocess.Popen(  # noqa: S603
            [
                *(python, "-m", "edge_ll_device.cli", "--log-level", "error", "learn", bundle),
                *("--trust", key, "--stream", stream, "--engine", engine),
                *("--seed", str(number), "--no-replay", "--json"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
        )
        for number, stream in enumerate(streams)
    ]
    outcomes = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outcomes, strict=True):
        if process.returncode:
            raise AgentError(f"learning without replay failed: {errors.decode(errors='replace')}")
    return [json.loads(output) for output, _ in outcomes]


def _environment() -> dict[str, str]:
    """This process's environment, without what would lead another interpreter astray."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONHOME"}
