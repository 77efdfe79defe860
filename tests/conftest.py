"""Brokers for the tests, each a process of its own on a free loopback port."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest


def skip_unless_ci(reason: str) -> NoReturn:
    """Skip with ``reason``; in CI fail, because there everything is installed."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"in CI this may not be skipped: {reason}")
    pytest.skip(reason)


def wait_until(condition, timeout_s: float = 10.0) -> bool:
    """Whether ``condition()`` becomes true within ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


class Mosquitto:
    """A Mosquitto broker that lets everybody in, on loopback, with nothing on disk."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._config = folder / "mosquitto.conf"
        self._config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence false\n"
            "log_dest none\nmax_queued_messages 0\n",
            encoding="utf-8",
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> None:
        # Debian keeps it in /usr/sbin, which is not on everybody's path.
        binary = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        assert binary is not None
        self._process = subprocess.Popen([binary, "-c", str(self._config)])
        assert wait_until(self._accepts), "mosquitto did not start"

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def _accepts(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
            return True
        return False


@pytest.fixture
def embedded_broker() -> Iterator:
    """An ``EmbeddedBroker``; tests that use it are marked ``fleet``."""
    if find_spec("amqtt") is None:
        pytest.skip('the embedded broker needs the extra "fleet"')
    from edge_ll.fleet.broker import EmbeddedBroker

    with EmbeddedBroker() as broker:
        yield broker


@pytest.fixture
def mosquitto_broker(tmp_path: Path) -> Iterator[Mosquitto]:
    """A running ``Mosquitto``; tests that use it are marked ``mosquitto``."""
    if shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
        skip_unless_ci("Mosquitto is not installed; run: apt-get install mosquitto")
    broker = Mosquitto(tmp_path)
    broker.start()
    yield broker
    broker.stop()
