"""The outbox: nothing is forgotten before the broker has it."""

from __future__ import annotations

import sqlite3

import pytest

from edge_ll.errors import DataError, TransportError
from edge_ll.messages import Address, BundleRef, Event, Reported
from edge_ll.transport.memory import MemoryBroker, MemoryTransport
from edge_ll_device import outbox as module
from edge_ll_device.outbox import Outbox
from tests.conftest import wait_until

HERE = Address("home", "hub")
SESSION = "0" * 16


def _event(number: int) -> Event:
    return Event(session=SESSION, at_s=0.0, kind="stream_ended", detail=str(number))


def _number(payload: bytes) -> int:
    return int(Event.decode(payload).detail)


@pytest.fixture
def outbox(tmp_path):
    box = Outbox(tmp_path / "outbox.sqlite", HERE)
    yield box
    box.close()


class Wire:
    """A transport whose acknowledgements come when the test says so."""

    def __init__(self) -> None:
        self.connected = True
        self.sent: list[tuple[int, bool]] = []
        self.acknowledged: set[int] = set()
        self.refuse_after = 10**9

    def publish(self, topic, payload, *, qos=1, retain=False):
        if len(self.sent) >= self.refuse_after:
            raise TransportError("too many in flight")
        number = _number(payload)
        self.sent.append((number, retain))
        wire = self

        class Fate:
            def wait(self, timeout_s):
                assert timeout_s == 0
                return number in wire.acknowledged

        return Fate()

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.sent]


def test_messages_arrive_in_order_and_are_then_forgotten(outbox):
    broker, heard = MemoryBroker(), []
    with (
        MemoryTransport(broker, client_id="fleet") as fleet,
        MemoryTransport(broker, client_id="hub") as hub,
    ):
        fleet.subscribe(Event.topic(HERE), lambda message: heard.append(_number(message.payload)))
        fleet.connect(1)
        for number in range(50):
            outbox.put(_event(number))
        outbox.drain(hub)
        assert len(outbox) == 50, "nothing leaves without a connection"
        hub.connect(1)
        for _ in range(10):
            outbox.drain(hub)
        assert len(outbox) == 0
        assert wait_until(lambda: len(heard) == 50)
    assert heard == list(range(50))


def test_the_retain_flag_and_the_topic_are_the_message_s(outbox):
    broker = MemoryBroker()
    with MemoryTransport(broker, client_id="hub") as hub:
        hub.connect(1)
        ref = BundleRef(name="toy", version=1, digest="a" * 64)
        outbox.put(Reported(session=SESSION, bundle=ref, state="pulling"))
        outbox.put(Reported(session=SESSION, bundle=ref, state="active"))
        outbox.put(_event(1))
        outbox.drain(hub)
        kept = broker.retained_for("el/v1/home/d/hub/#")
    assert [message.topic for message in kept] == ["el/v1/home/d/hub/reported"]
    assert Reported.decode(kept[0].payload).state == "active"


def test_a_message_stays_until_it_is_acknowledged(outbox):
    wire = Wire()
    outbox.put(_event(1))
    outbox.put(_event(2))
    for _ in range(3):
        outbox.drain(wire)
    assert wire.numbers == [1, 2], "what is in flight is not sent twice"
    assert len(outbox) == 2
    wire.acknowledged = {2}
    outbox.drain(wire)
    assert len(outbox) == 1
    wire.acknowledged = {1, 2}
    outbox.drain(wire)
    assert len(outbox) == 0
    assert wire.numbers == [1, 2]


@pytest.mark.parametrize("noticed", ["while down", "after the reconnection"])
def test_what_a_lost_connection_left_open_is_sent_again_in_order(outbox, noticed):
    wire = Wire()
    for number in range(3):
        outbox.put(_event(number))
    outbox.drain(wire)
    wire.acknowledged = {0}
    if noticed == "while down":
        wire.connected = False
        outbox.drain(wire)
        wire.connected = True
    else:
        outbox.drain(wire)
        outbox.reconnected()
    outbox.drain(wire)
    assert wire.numbers == [0, 1, 2, 1, 2]


def test_it_survives_being_opened_again(tmp_path):
    path = tmp_path / "outbox.sqlite"
    first = Outbox(path, HERE)
    for number in range(3):
        first.put(_event(number))
    wire = Wire()
    first.drain(wire)
    wire.acknowledged = {0}
    first.drain(wire)
    first.close()
    second, wire = Outbox(path, HERE), Wire()
    assert len(second) == 2
    second.put(_event(3))
    second.drain(wire)
    second.close()
    assert wire.numbers == [1, 2, 3]


def test_it_survives_a_process_that_never_closed_it(tmp_path):
    path = tmp_path / "outbox.sqlite"
    lost = Outbox(path, HERE)
    lost.put(_event(1))
    again = Outbox(path, HERE)
    assert len(again) == 1
    again.close()
    lost.close()


def test_no_more_than_the_window_is_in_flight(outbox):
    wire = Wire()
    for number in range(module.WINDOW + 5):
        outbox.put(_event(number))
    outbox.drain(wire)
    outbox.drain(wire)
    assert wire.numbers == list(range(module.WINDOW))
    wire.acknowledged = set(range(3))
    outbox.drain(wire)
    assert wire.numbers == list(range(module.WINDOW + 3))


def test_a_transport_that_refuses_is_asked_again(outbox):
    wire = Wire()
    wire.refuse_after = 1
    outbox.put(_event(0))
    outbox.put(_event(1))
    outbox.drain(wire)
    assert wire.numbers == [0]
    wire.refuse_after = 10
    outbox.drain(wire)
    assert wire.numbers == [0, 1]


def test_a_full_outbox_drops_the_oldest_and_counts(outbox, monkeypatch):
    monkeypatch.setattr(module, "CAPACITY", 3)
    wire = Wire()
    for number in range(5):
        outbox.put(_event(number))
    assert len(outbox) == 3
    assert outbox.dropped == 2
    outbox.drain(wire)
    assert wire.numbers == [2, 3, 4]


def test_dropping_what_is_in_flight_is_harmless(outbox, monkeypatch):
    monkeypatch.setattr(module, "CAPACITY", 2)
    wire = Wire()
    for number in range(2):
        outbox.put(_event(number))
    outbox.drain(wire)
    for number in range(2, 4):
        outbox.put(_event(number))
    outbox.drain(wire)
    wire.acknowledged = {0, 1, 2, 3}
    outbox.drain(wire)
    assert wire.numbers == [0, 1, 2, 3]
    assert len(outbox) == 0


@pytest.mark.parametrize("content", [b"this is no database" * 100, None])
def test_an_outbox_that_cannot_be_opened_says_so(tmp_path, content):
    path = tmp_path / "outbox.sqlite"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"outbox\.sqlite"):
        Outbox(path, HERE)


def test_a_database_that_fails_later_is_an_error_of_ours(tmp_path):
    path = tmp_path / "outbox.sqlite"
    outbox = Outbox(path, HERE)
    with sqlite3.connect(path) as other:
        other.execute("DROP TABLE outbox")
    other.close()
    with pytest.raises(DataError):
        outbox.put(_event(1))
    outbox.close()


def test_what_was_delivered_lately_is_sent_again_when_the_fleet_is_back(tmp_path):
    """A broker may acknowledge and die, or have nobody to give it to."""
    now = [100.0]
    outbox = Outbox(tmp_path / "outbox.sqlite", HERE, steady=lambda: now[0])
    wire = Wire()
    wire.acknowledged = set(range(200))
    outbox.put(_event(0))
    for _ in range(2):
        outbox.drain(wire)
    now[0] += module.RECENT_S + 1
    for number in range(1, module.RECENT + 3):
        outbox.put(_event(number))
    for _ in range(10):
        outbox.drain(wire)
    assert len(outbox) == 0
    sent = len(wire.sent)
    outbox.fleet_is_back()
    outbox.put(_event(199))
    for _ in range(10):
        outbox.drain(wire)
    again = wire.numbers[sent:]
    assert again == [*range(3, module.RECENT + 3), 199], "the latest, in order, before what is new"
    outbox.close()
    assert len(Outbox(tmp_path / "outbox.sqlite", HERE)) == 0
