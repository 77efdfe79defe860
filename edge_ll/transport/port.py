"""The transport port: what the agent and the fleet may ask of a message broker.

Delivery is at least once: a message may come twice (after a lost acknowledgement, or once per
filter where filters of one transport overlap), so handlers must bear repetition. A retained
message comes again after every reconnection, because the subscriptions are made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self


@dataclass(frozen=True)
class Message:
    """One received message; ``retained`` marks the broker's stored copy, not a fresh one."""

    topic: str
    payload: bytes
    retained: bool = False


@dataclass(frozen=True)
class Will:
    """What the broker publishes for a client that vanishes without saying goodbye."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False


Handler = Callable[[Message], None]


class Delivery(Protocol):
    """The fate of one published message."""

    def wait(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s`` seconds for the broker's acknowledgement.

        Returns:
            True once the broker acknowledged (at QoS 0: once the bytes were handed over). False
            when the time was up, the broker refused, or the connection was lost before: then the
            message may or may not have arrived, and the caller publishes it again when connected.
            Nothing is re-sent behind the caller's back.
        """
        ...


class Transport(Protocol):
    """A connection to a broker that survives the broker's and the network's absence.

    Handlers run one at a time, in order of arrival, on one thread of the transport's own (not on
    the network's), so a handler may publish and wait for the delivery. What a handler raises is
    logged and counted. The queue before them is bounded: when it is full the newest message is
    dropped, counted in ``dropped`` and logged once per burst. A message is acknowledged to the
    broker when it is queued, so QoS 1 does not cover a full queue or a process that dies: what
    must not be lost needs an answer by the application.
    """

    @property
    def connected(self) -> bool:
        """Whether a publish has a chance now: connected, and every subscription acknowledged."""
        ...

    @property
    def dropped(self) -> int:
        """Messages dropped because the queue before the handlers was full."""
        ...

    @property
    def handler_errors(self) -> int:
        """Exceptions raised by handlers; each was logged with its traceback."""
        ...

    def connect(self, timeout_s: float) -> None:
        """Start, and wait up to ``timeout_s`` seconds until connected.

        After a failure the transport keeps trying in the background until ``close``: a device
        that starts without a network catches the error and carries on.

        Raises:
            TransportError: Not connected in time, refused by the broker, or already closed.
        """
        ...

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False
    ) -> Delivery:
        """Hand one message over; may be called from any thread.

        Args:
            topic: At most 256 bytes, without wildcards.
            payload: The bytes; empty and retained, it removes the retained message.
            qos: 0 (at most once) or 1 (at least once).
            retain: Whether the broker keeps it for later subscribers.

        Raises:
            TransportError: Not connected (nothing is queued for later: keep the message and
                publish it from ``on_connect``), a wrong topic or QoS, or too many messages still
                unacknowledged.
        """
        ...

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """Call ``handler`` for every message whose topic matches ``topic_filter`` (QoS 1).

        May be called before ``connect``, which is the safe place: what a broker kept for a
        persistent session comes at once. Remembered, and made again at each reconnection.
        When connected, returns after the broker's acknowledgement.

        Raises:
            TransportError: The filter is wrong, or the broker refused it.
        """
        ...

    def on_connect(self, handler: Callable[[], None]) -> None:
        """Call ``handler`` after each (re)connection, when the subscriptions are in place.

        It runs on the handlers' thread and is never dropped. Retained messages may come before
        or after it.
        """
        ...

    def close(self) -> None:
        """Say goodbye (the will is not sent), hand out what is queued, and stop; idempotent."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
