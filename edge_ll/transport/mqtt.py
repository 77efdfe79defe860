"""The transport over a real MQTT broker: reconnects by itself, re-sends nothing by itself."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

from edge_ll.errors import TransportError
from edge_ll.transport import address, topics
from edge_ll.transport.dispatcher import Dispatcher
from edge_ll.transport.link import Identity, Link, LinkDelivery, RefusedError, Tls, Version
from edge_ll.transport.port import Handler, Will

log = logging.getLogger(__name__)

_OPEN_S = 10.0  # one attempt: TCP, TLS, CONNACK
_SUBACK_S = 10.0
_DRAIN_S = 5.0
_JOIN_S = 2.0
_FIRST_DELAY_S = 1.0
_STABLE_S = 30.0  # a connection that lived so long starts the back-off anew
_SESSION_EXPIRY_S = 7 * 24 * 3600


class MqttTransport:
    """A ``Transport`` over MQTT 3.1.1 or 5.

    Args:
        url: ``mqtt://[user:password@]host[:port]``, or ``mqtts://`` for TLS.
        client_id: Stable and unique at the broker; a second connection under it ends the first.
        will: Published by the broker when the connection is lost without ``close``.
        keepalive_s: Seconds of silence after which either side checks; a broker takes a client
            for lost after 1.5 times that.
        username: Instead of the one in the URL.
        password: Instead of the one in the URL.
        tls: The files for ``mqtts://``.
        protocol: "3.1.1" (the default for now: every broker speaks it), "5", or "auto", which
            tries 5 and takes 3.1.1 when the broker does not speak 5; the choice is logged.
        clean_session: False keeps a session at the broker (under MQTT 5 for seven days), which
            then stores QoS 1 messages while this client is away.
        queue_messages: How many messages may wait for the handlers.
        max_delay_s: The longest pause between two attempts to connect. Pauses double from 1 s
            and are random below that, so that a fleet does not return all at once.

    Raises:
        TransportError: The URL, the client id or the will is wrong.
    """

    def __init__(  # noqa: PLR0913 - each is a plain fact of one connection
        self,
        url: str,
        *,
        client_id: str,
        will: Will | None = None,
        keepalive_s: int = 30,
        username: str | None = None,
        password: str | None = None,
        tls: Tls | None = None,
        protocol: Literal["auto", "3.1.1", "5"] = "3.1.1",
        clean_session: bool = False,
        queue_messages: int = 10_000,
        max_delay_s: float = 60.0,
    ) -> None:
        if not client_id:
            raise TransportError("client id: expected a stable, unique name, got an empty string")
        if will is not None:
            topics.check_message(will.topic, will.payload, will.qos)
        self._identity = Identity(
            address=address.parse(url, username=username, password=password),
            client_id=client_id,
            will=will,
            keepalive_s=keepalive_s,
            clean_session=clean_session,
            session_expiry_s=_SESSION_EXPIRY_S,
            tls=tls or Tls(),
        )
        self._auto = protocol == "auto"
        self._version: Version = "3.1.1" if protocol == "3.1.1" else "5"
        self._max_delay_s = max_delay_s
        self._dispatcher = Dispatcher(f"dispatch-{client_id}", max_messages=queue_messages)
        self._on_connect: list[Callable[[], None]] = []
        # Guards what follows; notified when a connection is made or refused.
        self._changed = threading.Condition()
        self._link: Link | None = None  # set only while connected and subscribed
        self._opening: Link | None = None  # the one being made, if any
        self._trouble: TransportError | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    @property
    def connected(self) -> bool:
        """Whether a publish has a chance now."""
        link = self._link
        return link is not None and not link.ended

    @property
    def dropped(self) -> int:
        """Messages dropped because the queue before the handlers was full."""
        return self._dispatcher.dropped

    @property
    def handler_errors(self) -> int:
        """Exceptions raised by handlers."""
        return self._dispatcher.handler_errors

    def connect(self, timeout_s: float) -> None:
        """Start, and wait up to ``timeout_s`` seconds until connected and subscribed.

        Raises:
            TransportError: Not connected in time, refused, or closed. Unless closed, the
                transport keeps trying in the background.
        """
        with self._changed:
            if self._closing.is_set():
                raise TransportError(f"{self._identity.client_id} is closed; make a new transport")
            self._trouble = None
            if self._thread is None:
                name = f"connect-{self._identity.client_id}"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: self.connected or self._refused_for_good(), timeout_s)
            if self.connected and not self._refused_for_good():
                return
            trouble, for_good = self._trouble, self._refused_for_good()
        if for_good:
            raise TransportError(
                f"broker {self._identity.address}: {trouble}; "
                "check the client id, user and password, and what the broker allows them"
            ) from trouble
        raise TransportError(
            f"broker {self._identity.address}: not connected within {timeout_s:g} s "
            f"({trouble or 'no answer yet'}); check that the broker runs there and that its port "
            "is open for this machine; trying goes on in the background"
        ) from trouble

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False
    ) -> LinkDelivery:
        """Hand one message over; may be called from any thread.

        Raises:
            TransportError: Not connected (nothing is queued), a wrong topic or QoS, or too many
                messages still unacknowledged.
        """
        topics.check_message(topic, payload, qos)
        link = self._link
        if link is None or link.ended:
            raise TransportError(
                f"not connected to {self._identity.address}: nothing was queued; "
                "keep the message and publish it after the reconnection"
            )
        return link.publish(topic, payload, qos=qos, retain=retain)

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """Call ``handler`` for every message whose topic matches ``topic_filter``.

        Raises:
            TransportError: The filter is wrong, or the broker refused it or did not answer.
        """
        topics.check_filter(topic_filter)
        with self._changed:
            self._dispatcher.route(topic_filter, handler)
            link = self._link
        if link is None:
            return
        try:
            refused = link.subscribe([topic_filter], _SUBACK_S)
        except TransportError:
            if link.ended:
                return  # remembered: the next connection makes it
            raise
        if refused:
            raise self._refused_filters(refused)

    def on_connect(self, handler: Callable[[], None]) -> None:
        """Call ``handler`` after each (re)connection, when the subscriptions are in place."""
        with self._changed:
            self._on_connect.append(handler)

    def close(self) -> None:
        """Say goodbye (the will is not sent), hand out what is queued, and stop; idempotent."""
        with self._changed:
            self._closing.set()
            link, self._link = self._link or self._opening, None
            thread = self._thread
            self._changed.notify_all()
        if link is not None:
            link.close()
        if thread is not None:
            thread.join(_JOIN_S)  # it may hang in a name look-up, which nothing can interrupt
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

    # What follows runs on the connecting thread.

    def _run(self) -> None:
        attempts = 0
        while not self._closing.is_set():
            link = Link(self._identity, version=self._version, on_message=self._dispatcher.deliver)
            try:
                self._establish(link)
            except TransportError as error:
                self._failed(error)
            else:
                started = time.monotonic()
                self._lost(link.wait_ended())
                if time.monotonic() - started > _STABLE_S:
                    attempts = 0
            link.close()
            attempts += 1
            self._closing.wait(self._delay_s(attempts))

    def _establish(self, link: Link) -> None:
        """Open ``link``, make every subscription, and only then let publishers have it."""
        with self._changed:
            self._opening = link
        if self._closing.is_set():
            raise TransportError("closed while connecting")
        link.open(_OPEN_S)
        made: list[str] = []
        refused: list[str] = []
        while True:
            with self._changed:
                missing = [f for f in self._dispatcher.filters if f not in made]
                if not missing:
                    break_off = self._closing.is_set()
                    self._link, self._opening = (None if break_off else link), None
                    self._trouble = self._refused_filters(refused) if refused else None
                    handlers = list(self._on_connect)
                    self._changed.notify_all()
                    break
            refused += link.subscribe(missing, _SUBACK_S)
            made += missing
        if break_off:
            raise TransportError("closed while connecting")
        log.info("connected to %s (MQTT %s)", self._identity.address, self._version)
        if refused:
            log.error("%s: %s", self._identity.address, self._trouble)
        for handler in handlers:
            self._dispatcher.call(handler)

    def _failed(self, error: TransportError) -> None:
        if self._auto and self._version == "5" and not self._speaks_5(error):
            log.info("%s: %s; trying MQTT 3.1.1", self._identity.address, error)
            self._version = "3.1.1"
            return
        with self._changed:
            repeated = str(self._trouble) == str(error)
            self._trouble = error
            self._changed.notify_all()
        if not self._closing.is_set():
            level = logging.DEBUG if repeated else logging.WARNING
            log.log(level, "cannot connect to %s: %s", self._identity.address, error)

    def _lost(self, reason: str) -> None:
        with self._changed:
            self._link = None
        if not self._closing.is_set():
            log.warning("lost %s: %s", self._identity.address, reason)

    def _delay_s(self, attempts: int) -> float:
        most = min(self._max_delay_s, _FIRST_DELAY_S * 2.0 ** min(attempts - 1, 16))
        return random.uniform(0.1, 1.0) * most

    @staticmethod
    def _speaks_5(error: TransportError) -> bool:
        # A broker of 3.1.1 only answers in its own format or hangs up; either is no reason code
        # of MQTT 5 that speaks of anything but the version.
        if isinstance(error, RefusedError):
            return not error.bad_version
        return error.__cause__ is not None  # no TCP connection: nothing is known

    def _refused_for_good(self) -> bool:
        trouble = self._trouble
        return isinstance(trouble, RefusedError) and trouble.permanent

    def _refused_filters(self, refused: list[str]) -> RefusedError:
        return RefusedError(
            f"refused to subscribe {self._identity.client_id} to {', '.join(refused)}; "
            "check the broker's access rules",
            permanent=True,
            bad_version=False,
        )
