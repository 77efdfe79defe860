"""A broker and its transport inside one process: for tests, and where no network is needed.

It behaves as the weakest broker does: a client that is away misses what is not retained (no
session is kept for it), and a restart forgets the retained messages.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from edge_ll.errors import TransportError
from edge_ll.transport import topics
from edge_ll.transport.dispatcher import Dispatcher
from edge_ll.transport.port import Handler, Message, Will

_DRAIN_S = 5.0


class MemoryBroker:
    """Passes messages between the transports connected to it, in one order for all."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._retained: dict[str, bytes] = {}
        self._clients: dict[str, MemoryTransport] = {}

    def restart(self) -> None:
        """Lose every connection and every retained message, then take the clients back."""
        with self.lock:
            clients = list(self._clients.values())
            self._clients.clear()
            self._retained.clear()
        for client in clients:
            client.restore()

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Hand a message to every client, and keep it when ``retain`` is set."""
        with self.lock:
            if retain and payload:
                self._retained[topic] = payload
            elif retain:
                self._retained.pop(topic, None)
            for client in self._clients.values():
                client.receive(Message(topic, payload))

    def retained_for(self, topic_filter: str) -> list[Message]:
        """The kept messages whose topic matches ``topic_filter``."""
        with self.lock:
            return [
                Message(topic, payload, retained=True)
                for topic, payload in self._retained.items()
                if topics.matches(topic_filter, topic)
            ]

    def attach(self, client_id: str, client: MemoryTransport) -> None:
        """Take ``client`` in; an earlier one of the same id loses its connection."""
        with self.lock:
            earlier = self._clients.get(client_id)
            if earlier is not None and earlier is not client:
                earlier.drop()  # as MQTT does: one client id, one connection
            self._clients[client_id] = client

    def detach(self, client_id: str, client: MemoryTransport) -> bool:
        """Let ``client`` go; False when it was not connected."""
        with self.lock:
            if self._clients.get(client_id) is not client:
                return False
            del self._clients[client_id]
            return True

    def holds(self, client_id: str, client: MemoryTransport) -> bool:
        """Whether ``client`` is the one connected under ``client_id``."""
        return self._clients.get(client_id) is client


class _Done:
    """A delivery that happened while it was asked for."""

    def wait(self, timeout_s: float) -> bool:  # noqa: ARG002
        return True


class MemoryTransport:
    """A ``Transport`` to a ``MemoryBroker``.

    Args:
        broker: Shared by all transports that are to meet.
        client_id: One connection per id: a second one takes the first one's place.
        will: Published when the connection is lost by ``drop``, not by ``close``.
        queue_messages: How many messages may wait for the handlers.
    """

    def __init__(
        self,
        broker: MemoryBroker,
        *,
        client_id: str,
        will: Will | None = None,
        queue_messages: int = 10_000,
    ) -> None:
        if will is not None:
            topics.check_message(will.topic, will.payload, will.qos)
        self._broker = broker
        self._client_id = client_id
        self._will = will
        self._dispatcher = Dispatcher(f"dispatch-{client_id}", max_messages=queue_messages)
        self._on_connect: list[Callable[[], None]] = []
        self._closed = False

    @property
    def connected(self) -> bool:
        """Whether the broker holds this connection."""
        return self._broker.holds(self._client_id, self)

    @property
    def dropped(self) -> int:
        """Messages dropped because the queue before the handlers was full."""
        return self._dispatcher.dropped

    @property
    def handler_errors(self) -> int:
        """Exceptions raised by handlers."""
        return self._dispatcher.handler_errors

    def connect(self, timeout_s: float) -> None:  # noqa: ARG002 - the port's; nothing to wait for
        """Join the broker.

        Raises:
            TransportError: The transport was closed.
        """
        if self._closed:
            raise TransportError(f"{self._client_id} is closed; make a new transport")
        if not self.connected:
            self.restore()

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> _Done:
        """Pass one message to everybody who wants it.

        Raises:
            TransportError: Not connected, or a wrong topic or QoS.
        """
        topics.check_message(topic, payload, qos)
        if not self.connected:
            raise TransportError(
                f"{self._client_id} is not connected: nothing was queued; "
                "keep the message and publish it after the reconnection"
            )
        self._broker.publish(topic, bytes(payload), retain=retain)
        return _Done()

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """Call ``handler`` for every message whose topic matches ``topic_filter``.

        Raises:
            TransportError: The filter is wrong.
        """
        topics.check_filter(topic_filter)
        with self._broker.lock:  # no message may pass between the two steps
            self._dispatcher.route(topic_filter, handler)
            if self.connected:
                self._deliver_retained(topic_filter)

    def on_connect(self, handler: Callable[[], None]) -> None:
        """Call ``handler`` after each (re)connection."""
        self._on_connect.append(handler)

    def drop(self) -> None:
        """Lose the connection without a goodbye: the broker publishes the will."""
        if self._broker.detach(self._client_id, self) and self._will is not None:
            will = self._will
            self._broker.publish(will.topic, will.payload, retain=will.retain)

    def restore(self) -> None:
        """Connect again after ``drop``; nothing happens on a closed or connected transport."""
        if self._closed or self.connected:
            return
        with self._broker.lock:  # retained messages come before newer ones
            self._broker.attach(self._client_id, self)
            for topic_filter in self._dispatcher.filters:
                self._deliver_retained(topic_filter)
            for handler in list(self._on_connect):
                self._dispatcher.call(handler)

    def close(self) -> None:
        """Leave the broker without a will, hand out what is queued, and stop; idempotent."""
        self._closed = True
        self._broker.detach(self._client_id, self)
        self._dispatcher.stop(_DRAIN_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _deliver_retained(self, topic_filter: str) -> None:
        for message in self._broker.retained_for(topic_filter):
            self._dispatcher.deliver(message)

    def receive(self, message: Message) -> None:
        """Take a message from the broker if it is subscribed to."""
        if any(topics.matches(wanted, message.topic) for wanted in self._dispatcher.filters):
            self._dispatcher.deliver(message)
