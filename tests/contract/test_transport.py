"""What every transport promises, on memory, on the embedded broker and on Mosquitto."""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from contextlib import suppress

import pytest

from edge_ll.errors import TransportError
from edge_ll.transport import Message, Transport, Will
from edge_ll.transport.memory import MemoryBroker, MemoryTransport
from edge_ll.transport.mqtt import MqttTransport
from tests.conftest import wait_until


class Proxy:
    """A TCP wire to the broker that can be frozen or cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._flowing = threading.Event()
        self._flowing.set()
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def freeze(self) -> None:
        self._flowing.clear()

    def cut(self) -> None:
        """Reset every connection, as a router that restarts does; later ones pass again."""
        sockets, self._sockets = self._sockets, []
        for end in sockets:
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._flowing.set()

    def close(self) -> None:
        self._server.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    near.close()
                    continue
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                sink.sendall(data)
        self._flowing.wait()
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class MemoryWorld:
    """A broker, and transports that are closed at the end."""

    def __init__(self) -> None:
        self._broker = MemoryBroker()
        self._transports: list[MemoryTransport] = []

    def transport(self, client_id: str, *, connect: bool = True, **options) -> MemoryTransport:
        made = MemoryTransport(self._broker, client_id=client_id, **options)
        self._transports.append(made)
        if connect:
            made.connect(5)
        return made

    def cut(self, transport: MemoryTransport) -> None:
        transport.drop()

    def restore(self, transport: MemoryTransport) -> None:
        transport.restore()

    def restart(self) -> None:
        self._broker.restart()

    def close(self) -> None:
        for transport in self._transports:
            transport.close()


class MqttWorld:
    """The same over a real broker; each transport behind a wire of its own."""

    def __init__(self, broker) -> None:
        self.broker = broker
        self._wires: dict[Transport, Proxy] = {}

    def transport(self, client_id: str, *, connect: bool = True, **options) -> MqttTransport:
        wire = Proxy(self.broker.port)
        made = MqttTransport(
            f"mqtt://127.0.0.1:{wire.port}", client_id=client_id, max_delay_s=0.3, **options
        )
        self._wires[made] = wire
        if connect:
            made.connect(10)
        return made

    def freeze(self, transport: MqttTransport) -> None:
        self._wires[transport].freeze()

    def cut(self, transport: MqttTransport) -> None:
        self._wires[transport].cut()

    def restore(self, transport: MqttTransport) -> None:
        """It reconnects by itself."""

    def restart(self) -> None:
        self.broker.restart()

    def close(self) -> None:
        for transport, wire in self._wires.items():
            transport.close()
            wire.close()


EMBEDDED = pytest.param("embedded", marks=pytest.mark.fleet)
MOSQUITTO = pytest.param("mosquitto", marks=pytest.mark.mosquitto)


def make_world(request):
    if request.param == "memory":
        return MemoryWorld()
    return MqttWorld(request.getfixturevalue(f"{request.param}_broker"))


@pytest.fixture(params=["memory", EMBEDDED, MOSQUITTO])
def world(request):
    made = make_world(request)
    yield made
    made.close()


@pytest.fixture(params=[EMBEDDED, MOSQUITTO])
def mqtt_world(request):
    made = make_world(request)
    yield made
    made.close()


def test_messages_come_in_order_and_none_is_lost(world):
    got: list[Message] = []
    world.transport("listener").subscribe("count/#", got.append)
    speaker = world.transport("speaker")
    deliveries = [speaker.publish("count/up", str(i).encode()) for i in range(2000)]
    assert all(delivery.wait(30) for delivery in deliveries)
    assert wait_until(lambda: len(got) >= 2000, 30)
    assert [int(message.payload) for message in got] == list(range(2000))
    assert not any(message.retained for message in got)


@pytest.mark.parametrize("qos", [0, 1])
def test_a_delivery_is_acknowledged(world, qos):
    got: list[Message] = []
    world.transport("listener").subscribe("a", got.append)
    assert world.transport("speaker").publish("a", b"x", qos=qos).wait(10)
    assert wait_until(lambda: got == [Message("a", b"x")])


def test_a_retained_message_waits_for_the_subscriber_and_can_be_removed(world):
    speaker = world.transport("speaker")
    assert speaker.publish("state/d1", b"on", retain=True).wait(10)
    early: list[Message] = []
    world.transport("early").subscribe("state/+", early.append)
    assert wait_until(lambda: early == [Message("state/d1", b"on", retained=True)])

    assert speaker.publish("state/d1", b"", retain=True).wait(10)
    late: list[Message] = []
    listener = world.transport("late")
    listener.subscribe("state/+", late.append)
    assert speaker.publish("state/end", b"end").wait(10)
    assert wait_until(lambda: late == [Message("state/end", b"end")])


def test_a_client_sees_only_retained_messages_it_asked_for(world):
    world.transport("curious").subscribe("secret/#", lambda _: None)
    speaker = world.transport("speaker")
    assert speaker.publish("secret/a", b"1", retain=True).wait(10)
    assert speaker.publish("public/a", b"2", retain=True).wait(10)
    got: list[Message] = []
    listener = world.transport("listener", connect=False)
    listener.subscribe("public/#", got.append)
    listener.connect(10)
    assert speaker.publish("public/end", b"end").wait(10)
    assert wait_until(lambda: got and got[-1].payload == b"end")
    assert got == [Message("public/a", b"2", retained=True), Message("public/end", b"end")]


def test_wildcards_choose_and_every_matching_handler_is_called(world):
    plus: list[str] = []
    other: list[str] = []
    both: list[str] = []
    listener = world.transport("listener")
    listener.subscribe("el/+/status", lambda message: plus.append(message.topic))
    listener.subscribe("other/#", lambda message: other.append(message.topic))
    listener.subscribe("other/#", lambda message: both.append(message.topic))
    speaker = world.transport("speaker")
    for topic in ("el/a/status", "el/a/b/status", "el/status", "other", "other/x/y", "el/z/status"):
        assert speaker.publish(topic, b"").wait(10)
    assert wait_until(lambda: len(plus) >= 2 and len(both) >= 2)
    assert plus == ["el/a/status", "el/z/status"]
    assert other == both == ["other", "other/x/y"]


def test_the_will_comes_after_an_abrupt_loss_only(world):
    got: list[Message] = []
    world.transport("listener").subscribe("status/#", got.append)
    will = Will("status/polite", b"gone", retain=True)
    world.transport("polite", will=will).close()
    will = Will("status/lost", b"gone", retain=True)
    lost = world.transport("lost", will=will)
    world.cut(lost)
    assert wait_until(lambda: got == [Message("status/lost", b"gone")])
    later: list[Message] = []
    world.transport("later").subscribe("status/lost", later.append)
    assert wait_until(lambda: later == [Message("status/lost", b"gone", retained=True)])


def test_after_a_loss_subscriptions_are_made_again_before_on_connect(world):
    got: list[bytes] = []
    events: list[str] = []
    device = world.transport("device", connect=False)
    device.subscribe("to/device", lambda message: got.append(message.payload))

    def announce() -> None:
        # A handler may publish and wait, and its own subscription is in place by now.
        events.append("connected")
        assert device.publish("to/device", b"%d" % len(events)).wait(10)

    device.on_connect(announce)
    device.connect(10)
    assert wait_until(lambda: got == [b"1"])
    world.cut(device)
    world.restore(device)
    assert wait_until(lambda: got[-1:] == [b"2"])
    assert events == ["connected"] * 2
    assert device.handler_errors == 0


def test_a_restarted_broker_is_found_again(world):
    got: list[bytes] = []
    connections: list[float] = []
    device = world.transport("device", connect=False)
    device.subscribe("a/#", lambda message: got.append(message.payload))
    device.on_connect(lambda: connections.append(time.monotonic()))
    device.connect(10)
    server = world.transport("server")
    assert wait_until(lambda: len(connections) == 1)
    world.restart()
    assert wait_until(lambda: len(connections) == 2 and device.connected and server.connected, 20)
    assert server.publish("a/b", b"again").wait(10)
    assert wait_until(lambda: got == [b"again"])


def test_publishing_while_offline_is_refused_and_nothing_comes_later(world):
    got: list[bytes] = []
    world.transport("listener").subscribe("a", lambda message: got.append(message.payload))
    device = world.transport("device", connect=False)
    assert not device.connected
    with pytest.raises(TransportError, match="not connected"):
        device.publish("a", b"lost")
    device.connect(10)
    assert device.connected
    assert device.publish("a", b"kept").wait(10)
    assert wait_until(lambda: got == [b"kept"])


def test_a_handler_that_fails_is_logged_and_counted_and_the_next_is_called(world, caplog):
    got: list[bytes] = []

    def fragile(message: Message) -> None:
        if message.payload == b"bad":
            raise ValueError("cannot read this")

    device = world.transport("device")
    device.subscribe("a", fragile)
    device.subscribe("a", lambda message: got.append(message.payload))
    server = world.transport("server")
    with caplog.at_level(logging.ERROR):
        for payload in (b"good", b"bad", b"good"):
            server.publish("a", payload)
        assert wait_until(lambda: got == [b"good", b"bad", b"good"])
    assert device.handler_errors == 1
    assert "cannot read this" in caplog.text


def test_a_handler_may_publish_and_wait(world):
    device = world.transport("device")
    acknowledged: list[bool] = []

    def answer(message: Message) -> None:
        acknowledged.append(device.publish("answer", message.payload).wait(10))

    device.subscribe("question", answer)
    got: list[bytes] = []
    server = world.transport("server")
    server.subscribe("answer", lambda message: got.append(message.payload))
    for number in range(20):
        server.publish("question", b"%d" % number)
    assert wait_until(lambda: len(got) == 20)
    assert acknowledged == [True] * 20


def test_handlers_run_on_one_thread_of_their_own(world):
    threads: set[str] = set()
    device = world.transport("device", connect=False)
    device.subscribe("a", lambda _: threads.add(threading.current_thread().name))
    device.on_connect(lambda: threads.add(threading.current_thread().name))
    device.connect(10)
    assert device.publish("a", b"").wait(10)
    assert wait_until(lambda: threads == {"dispatch-device"})


def test_many_threads_may_publish(world):
    got: list[bytes] = []
    world.transport("listener").subscribe("a/+", lambda message: got.append(message.payload))
    speaker = world.transport("speaker")
    outcomes: list[bool] = []

    def speak(number: int) -> None:
        outcomes.extend(speaker.publish(f"a/{number}", b"x").wait(10) for _ in range(50))

    threads = [threading.Thread(target=speak, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 400
    assert wait_until(lambda: len(got) == 400)


def test_a_large_payload_arrives_whole(world):
    payload = bytes(range(256)) * 4096
    got: list[Message] = []
    world.transport("listener").subscribe("big", got.append)
    assert world.transport("speaker").publish("big", payload, retain=True).wait(30)
    assert wait_until(lambda: len(got) == 1, 30)
    assert got[0].payload == payload


def test_a_full_queue_drops_the_newest_and_counts(world):
    release = threading.Event()
    got: list[bytes] = []

    def slow(message: Message) -> None:
        release.wait(10)
        got.append(message.payload)

    listener = world.transport("listener", queue_messages=10)
    listener.subscribe("a", slow)
    speaker = world.transport("speaker")
    first = speaker.publish("a", b"0")
    assert first.wait(10)
    time.sleep(0.3)  # the first is in the handler, not in the queue
    deliveries = [speaker.publish("a", b"%d" % number) for number in range(1, 31)]
    assert all(delivery.wait(10) for delivery in deliveries)
    assert wait_until(lambda: listener.dropped == 20)
    release.set()
    assert wait_until(lambda: len(got) == 11)
    assert got == [b"%d" % number for number in range(11)]


def test_wrong_topics_filters_and_qos_are_refused(world):
    device = world.transport("device")
    for topic in ("", "a/+", "a/#", "a\0b", "x" * 257):
        with pytest.raises(TransportError):
            device.publish(topic, b"")
    for topic_filter in ("", "a#", "a/#/b", "a+/b", "a\0b", "$share/g/a"):
        with pytest.raises(TransportError):
            device.subscribe(topic_filter, lambda _: None)
    with pytest.raises(TransportError, match="QoS"):
        device.publish("a", b"", qos=2)


def test_a_closed_transport_stays_closed(world):
    device = world.transport("device")
    device.close()
    device.close()
    assert not device.connected
    with pytest.raises(TransportError, match="not connected"):
        device.publish("a", b"")
    with pytest.raises(TransportError, match="closed"):
        device.connect(1)


def test_closing_hands_out_what_is_queued(world):
    got: list[bytes] = []
    device = world.transport("device")

    def slow(message: Message) -> None:
        time.sleep(0.02)
        got.append(message.payload)

    device.subscribe("a", slow)
    # Its own messages: what this connection was acknowledged after, it has also received.
    for number in range(20):
        assert device.publish("a", b"%d" % number).wait(10)
    time.sleep(0.1)
    device.close()
    assert len(got) == 20


def test_a_handler_may_close_its_transport(world):
    device = world.transport("device")
    device.subscribe("stop", lambda _: device.close())
    device.publish("stop", b"")
    assert wait_until(lambda: not device.connected)
    assert device.handler_errors == 0


def test_a_lost_delivery_says_so_and_is_not_sent_again_by_itself(mqtt_world):
    got: list[bytes] = []
    mqtt_world.transport("listener").subscribe("a", lambda message: got.append(message.payload))
    again = threading.Event()
    device = mqtt_world.transport("device")
    device.on_connect(again.set)
    mqtt_world.freeze(device)
    delivery = device.publish("a", b"once")
    assert not delivery.wait(0.2)
    started = time.monotonic()
    threading.Timer(0.2, mqtt_world.cut, [device]).start()
    assert not delivery.wait(30)
    assert time.monotonic() - started < 5
    assert again.wait(10)
    time.sleep(0.3)
    assert got == []
    assert device.publish("a", b"once").wait(10)
    assert wait_until(lambda: got == [b"once"])


def test_a_client_that_returns_past_its_own_frozen_connection_stays(mqtt_world):
    statuses: list[bytes] = []
    watcher = mqtt_world.transport("watcher")
    watcher.subscribe("status", lambda message: statuses.append(message.payload))
    frozen = mqtt_world.transport("device", will=Will("status", b"offline"))
    mqtt_world.freeze(frozen)
    got: list[bytes] = []
    device = mqtt_world.transport("device", connect=False, will=Will("status", b"offline"))
    device.subscribe("to/device", lambda message: got.append(message.payload))
    device.on_connect(lambda: device.publish("status", b"online"))
    device.connect(10)
    assert wait_until(lambda: statuses[-1:] == [b"online"])
    time.sleep(2.5)  # longer than a broker takes to clean up
    assert device.connected
    # Brokers differ in whether a takeover sends the will, but it must not come late.
    assert statuses in ([b"online"], [b"offline", b"online"])
    assert watcher.publish("to/device", b"hello").wait(10)
    assert wait_until(lambda: got == [b"hello"])


@pytest.mark.parametrize("protocol", ["auto", "3.1.1"])
def test_the_protocol_is_found(mqtt_world, protocol):
    device = mqtt_world.transport("device", connect=False, protocol=protocol)
    device.connect(10)
    got: list[bytes] = []
    device.subscribe("a", lambda message: got.append(message.payload))
    assert device.publish("a", b"x").wait(10)
    assert wait_until(lambda: got == [b"x"])


def test_silence_past_the_keepalive_is_a_loss(mqtt_world):
    statuses: list[bytes] = []
    watcher = mqtt_world.transport("watcher")
    watcher.subscribe("status", lambda message: statuses.append(message.payload))
    device = mqtt_world.transport("device", keepalive_s=1, will=Will("status", b"offline"))
    time.sleep(3.5)  # long enough for keep-alive packets to prove themselves
    assert device.connected
    assert statuses == []
    mqtt_world.freeze(device)
    assert wait_until(lambda: statuses == [b"offline"], 15)
    assert wait_until(lambda: not device.connected, 5)


@pytest.mark.mosquitto
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_persistent_session_keeps_messages_for_an_absent_client(mosquitto_broker, protocol):
    def make() -> MqttTransport:
        return MqttTransport(mosquitto_broker.url, client_id="device", protocol=protocol)

    got: list[bytes] = []
    with make() as device:
        device.subscribe("cmd", lambda message: got.append(message.payload))
        device.connect(10)
    with MqttTransport(mosquitto_broker.url, client_id="server") as server:
        server.connect(10)
        assert server.publish("cmd", b"while away").wait(10)
    with make() as device:
        device.subscribe("cmd", lambda message: got.append(message.payload))
        device.connect(10)
        assert wait_until(lambda: got == [b"while away"])


def test_a_missing_broker_is_named_and_found_later():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with MqttTransport(f"mqtt://127.0.0.1:{port}", client_id="device") as device:
        with pytest.raises(TransportError, match=rf"127\.0\.0\.1:{port}.*refused.*check that"):
            device.connect(0.3)
        assert not device.connected


@pytest.mark.fleet
def test_a_device_that_starts_without_a_broker_connects_when_it_comes(embedded_broker):
    embedded_broker.kill()
    assert embedded_broker.pid is None
    connected = threading.Event()
    url = embedded_broker.url
    with MqttTransport(url, client_id="device", max_delay_s=0.3) as device:
        device.on_connect(connected.set)
        with pytest.raises(TransportError):
            device.connect(0.3)
        embedded_broker.restart()
        assert connected.wait(10)
        device.connect(10)
        assert device.publish("a", b"").wait(10)


def test_something_that_is_no_broker_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def hang_up() -> None:
            with suppress(OSError):
                while True:
                    server.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        with (
            MqttTransport(f"mqtt://127.0.0.1:{port}", client_id="device") as device,
            pytest.raises(TransportError, match=str(port)),
        ):
            device.connect(0.5)
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.mosquitto
def test_a_wrong_password_is_told_at_once(mosquitto_broker, tmp_path):
    config = tmp_path / "mosquitto.conf"
    text = config.read_text().replace("allow_anonymous true", "allow_anonymous false")
    config.write_text(text)
    mosquitto_broker.restart()
    url = mosquitto_broker.url.replace("//", "//user:s3cret@")
    started = time.monotonic()
    with MqttTransport(url, client_id="device") as device:
        with pytest.raises(TransportError, match="refused") as caught:
            device.connect(20)
        assert time.monotonic() - started < 5
        assert "s3cret" not in str(caught.value)
