from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from edge_ll.errors import MissingExtraError, TransportError
from edge_ll.fleet import broker


def accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "amqtt", None)
    with pytest.raises(MissingExtraError, match=r"edge-ll\[fleet\]"):
        broker.EmbeddedBroker()


@pytest.mark.fleet
def test_it_stops_and_comes_back_on_its_port(embedded_broker):
    port, pid = embedded_broker.port, embedded_broker.pid
    assert accepts(port)
    embedded_broker.stop()
    embedded_broker.stop()
    assert not accepts(port)
    embedded_broker.restart()
    assert accepts(port)
    assert embedded_broker.port == port
    assert embedded_broker.pid != pid


@pytest.mark.fleet
def test_a_taken_port_is_named(embedded_broker):
    with pytest.raises(TransportError, match=str(embedded_broker.port)):
        broker.EmbeddedBroker(embedded_broker.port)


@pytest.mark.fleet
def test_it_ends_when_its_parent_is_killed(embedded_broker):
    code = (
        "import time; from edge_ll.fleet.broker import EmbeddedBroker\n"
        "print(EmbeddedBroker().port, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout as output:
        port = int(output.readline())
    assert accepts(port)
    parent.kill()
    parent.wait(10)
    deadline = time.monotonic() + 10
    while accepts(port) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not accepts(port)


@pytest.mark.fleet
def test_the_command_ends_cleanly_on_sigterm_and_prints_nothing():
    pytest.importorskip("amqtt", reason='the embedded broker needs the extra "fleet"')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "edge_ll.fleet.broker", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 10
    while not accepts(port) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.communicate(timeout=10) == (b"", b"")
    assert process.returncode == 0
