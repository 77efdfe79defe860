"""One MQTT connection, from its TCP handshake to its loss, on paho-mqtt.

Each connection gets a paho client of its own, used once. So nothing of paho's hidden state
survives a loss: no queue that is re-sent beside the caller's own repetition, no burst of a
backlog past the broker's limits, no lasting downgrade of the protocol.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_ll.errors import TransportError
from edge_ll.transport.address import Address
from edge_ll.transport.port import Message, Will

log = logging.getLogger(__name__)

Version = Literal["3.1.1", "5"]

_IN_FLIGHT = 20  # Mosquitto's default window
_QUEUED = 20_000  # below the 65,535 message ids of one connection
_ALIVE_CHECK_S = 5.0
_STOP_S = 5.0
# CONNACK reasons that waiting does not mend: bad client id, user, password, or not allowed.
_PERMANENT = frozenset({133, 134, 135, 138})
_BAD_VERSION = 132


class RefusedError(TransportError):
    """The broker answered the connection with a refusal.

    ``permanent`` when only a change of the configuration helps; ``bad_version`` when the broker
    does not speak the protocol's version.
    """

    def __init__(self, text: str, *, permanent: bool, bad_version: bool) -> None:
        super().__init__(text)
        self.permanent = permanent
        self.bad_version = bad_version


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Files for TLS, each a path to PEM; without ``ca_file`` the system's authorities count."""

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who connects and how; the same for all connections of one transport."""

    address: Address
    client_id: str
    will: Will | None
    keepalive_s: int
    clean_session: bool
    session_expiry_s: int
    tls: Tls


class LinkDelivery:
    """The fate of one message on one connection."""

    def __init__(self) -> None:
        self._decided = threading.Event()
        self._arrived = False

    def wait(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s`` seconds; False when refused, lost, or the time is up."""
        self._decided.wait(timeout_s)
        return self._arrived

    def decide(self, *, arrived: bool) -> None:
        """Set the fate; the first word counts."""
        if not self._decided.is_set():
            self._arrived = arrived
            self._decided.set()


class Link:
    """One connection; made, opened once, used until ``ended``, closed, thrown away.

    Args:
        identity: Who connects and where.
        version: The MQTT version spoken.
        on_message: Called on paho's thread; must only queue.
    """

    def __init__(
        self, identity: Identity, *, version: Version, on_message: Callable[[Message], object]
    ) -> None:
        self._identity = identity
        self._version = version
        self._on_message = on_message
        self._lock = threading.Lock()
        self._closing = threading.Lock()
        self._answered = threading.Event()
        self._ended = threading.Event()
        self._refusal: RefusedError | None = None
        self._lost_because = "the connection was closed"
        self._deliveries: dict[int, LinkDelivery] = {}
        self._fates: dict[int, bool] = {}  # known before publish() returned to its caller
        self._subacks: dict[int, list[ReasonCode]] = {}
        self._suback = threading.Condition()
        self._client = self._make_client()

    def open(self, timeout_s: float) -> None:
        """Connect and wait up to ``timeout_s`` seconds (TCP and MQTT) for the broker's answer.

        Raises:
            RefusedError: The broker answered no.
            TransportError: No broker, no answer in time, or a TLS failure.
        """
        identity, deadline = self._identity, time.monotonic() + timeout_s
        self._client.connect_timeout = timeout_s
        try:
            if identity.address.tls:
                tls = identity.tls
                self._client.tls_set(tls.ca_file, tls.cert_file, tls.key_file)
            self._client.connect(
                identity.address.host,
                identity.address.port,
                identity.keepalive_s,
                **self._version_5_arguments(),
            )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise TransportError(reason) from error
        self._client.loop_start()
        self._answered.wait(max(0.0, deadline - time.monotonic()))
        if self._refusal is not None:
            raise self._refusal
        if self._ended.is_set():
            raise TransportError(f"{self._lost_because} before the broker answered")
        if not self._answered.is_set():
            raise TransportError(f"no MQTT answer within {timeout_s:g} s; is it an MQTT broker?")

    def publish(self, topic: str, payload: bytes, *, qos: int, retain: bool) -> LinkDelivery:
        """Hand one message to paho.

        Raises:
            TransportError: The connection is gone, or too many messages are unacknowledged.
        """
        delivery = LinkDelivery()
        # Not under our lock: paho calls back under locks of its own that publish() takes too.
        info = self._client.publish(topic, payload, qos, retain)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            raise TransportError(
                f"{_QUEUED:,} messages to {self._identity.address} are not acknowledged yet; "
                "wait for deliveries before publishing more"
            )
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS or self._ended.is_set():
            raise TransportError(f"the connection to {self._identity.address} was just lost")
        with self._lock:
            if self._ended.is_set():
                delivery.decide(arrived=False)
            elif info.mid in self._fates:
                delivery.decide(arrived=self._fates.pop(info.mid))
            else:
                self._deliveries[info.mid] = delivery
        return delivery

    def subscribe(self, filters: Sequence[str], timeout_s: float) -> list[str]:
        """Subscribe at QoS 1 and wait up to ``timeout_s`` seconds for the acknowledgement.

        Returns:
            The filters that the broker refused.

        Raises:
            TransportError: The connection was lost or the broker did not answer in time.
        """
        if not filters:
            return []
        code, mid = self._client.subscribe([(topic_filter, 1) for topic_filter in filters])
        if code != MQTTErrorCode.MQTT_ERR_SUCCESS or mid is None:
            raise TransportError(f"the connection to {self._identity.address} was just lost")
        with self._suback:
            self._suback.wait_for(lambda: mid in self._subacks or self._ended.is_set(), timeout_s)
            reasons = self._subacks.pop(mid, None)
        if reasons is None:
            cause = "connection lost" if self._ended.is_set() else f"none within {timeout_s:g} s"
            raise TransportError(
                f"{self._identity.address}: expected a subscription's acknowledgement, {cause}"
            )
        return [
            topic_filter
            for topic_filter, reason in zip(filters, reasons, strict=False)
            if reason.is_failure
        ]

    @property
    def ended(self) -> bool:
        """Whether the connection is known to be gone."""
        return self._ended.is_set()

    def wait_ended(self) -> str:
        """Block until the connection is gone; returns why."""
        while not self._ended.wait(_ALIVE_CHECK_S):
            # paho leaves its loop without a callback when select() fails, for example on a file
            # descriptor past 1,023.
            if not self._client.is_connected():
                self._end("the network loop stopped")
        return self._lost_because

    def close(self) -> None:
        """Say goodbye if still connected, stop paho's thread, and settle every delivery."""
        with self._closing:  # the transport's user and its connecting thread may both come here
            client = self._client
            client.disconnect()
            # While paho's thread still runs, the goodbye waits behind what is being sent.
            self._ended.wait(_STOP_S if self._answered.is_set() else 0.0)
            self._end(self._lost_because)
            self._cut()
            with suppress(AttributeError):  # loop_stop() joins a thread that unsets itself
                client.loop_stop()
            # Callbacks are methods of ours: without this, client and link keep each other alive.
            client.on_connect = client.on_disconnect = client.on_message = None
            client.on_publish = client.on_subscribe = client.on_socket_open = None

    def _cut(self) -> None:
        """Break a connection that took no goodbye, so that paho's thread wakes and ends."""
        sock = self._client.socket()
        if isinstance(sock, socket.socket):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _make_client(self) -> Client:
        identity, modern = self._identity, self._version == "5"
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=identity.client_id,
            clean_session=None if modern else identity.clean_session,
            protocol=MQTTProtocolVersion.MQTTv5 if modern else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        client.max_inflight_messages_set(_IN_FLIGHT)
        client.max_queued_messages_set(_QUEUED)
        if identity.address.username is not None:
            client.username_pw_set(identity.address.username, identity.address.password)
        if (will := identity.will) is not None:
            client.will_set(will.topic, will.payload, will.qos, will.retain)
        client.on_connect = self._connected
        client.on_disconnect = self._disconnected
        client.on_message = self._received
        client.on_publish = self._published
        client.on_subscribe = self._subscribed
        client.on_socket_open = _send_at_once
        return client

    def _version_5_arguments(self) -> dict[str, Any]:
        if self._version != "5":
            return {}
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        if not self._identity.clean_session:
            # Without it MQTT 5 ends the session with the connection.
            properties.SessionExpiryInterval = self._identity.session_expiry_s
        return {"clean_start": self._identity.clean_session, "properties": properties}

    # What follows runs on paho's thread.

    def _connected(
        self, _client: Client, _data: Any, _flags: ConnectFlags, reason: ReasonCode, _more: Any
    ) -> None:
        if reason.is_failure:
            self._refusal = RefusedError(
                f"the broker refused the connection: {reason}",
                permanent=reason.value in _PERMANENT,
                bad_version=reason.value == _BAD_VERSION,
            )
        self._answered.set()

    def _disconnected(
        self, _client: Client, _data: Any, _flags: DisconnectFlags, reason: ReasonCode, _more: Any
    ) -> None:
        self._end(f"the connection was closed ({reason})")

    def _received(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            log.warning("a message with a topic that is not UTF-8 was ignored")
            return
        self._on_message(Message(topic, bytes(message.payload), retained=message.retain))

    def _published(
        self, _client: Client, _data: Any, mid: int, reason: ReasonCode, _more: Any
    ) -> None:
        arrived = not reason.is_failure
        if not arrived:
            log.warning("%s refused a message: %s", self._identity.address, reason)
        with self._lock:
            delivery = self._deliveries.pop(mid, None)
            if delivery is None:
                self._fates[mid] = arrived
        if delivery is not None:
            delivery.decide(arrived=arrived)

    def _subscribed(
        self, _client: Client, _data: Any, mid: int, reasons: list[ReasonCode], _more: Any
    ) -> None:
        with self._suback:
            self._subacks[mid] = reasons
            self._suback.notify_all()

    def _end(self, reason: str) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            self._lost_because = reason
            self._ended.set()
            deliveries = list(self._deliveries.values())
            self._deliveries.clear()
        self._answered.set()
        for delivery in deliveries:
            delivery.decide(arrived=False)
        with self._suback:
            self._suback.notify_all()


def _send_at_once(_client: Client, _data: Any, sock: Any) -> None:
    """Small packets must not wait for the acknowledgement of earlier ones (Nagle)."""
    with suppress(OSError, AttributeError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
