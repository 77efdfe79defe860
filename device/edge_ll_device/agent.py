"""The agent: takes offers, runs the student on local samples, reports, uploads on command.

Everything happens on the thread that calls :meth:`Agent.run`; the transport's handlers only put
messages into the inbox.
"""

from __future__ import annotations

import logging
import platform
import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_ll import __version__
from edge_ll.errors import ProtocolError, TransportError
from edge_ll.messages import (
    Address,
    Birth,
    Chunk,
    Command,
    Message,
    Offer,
    Placement,
    Status,
    UpdateRequest,
)
from edge_ll.transport import Message as Received
from edge_ll.transport import Transport, Will
from edge_ll_device.config import AgentConfig
from edge_ll_device.deployment import Deployment
from edge_ll_device.machine import peak_rss_bytes
from edge_ll_device.outbox import Outbox
from edge_ll_device.reporter import Reporter
from edge_ll_device.source import RecordedStream, Sample
from edge_ll_device.store import Store
from edge_ll_device.student import Student
from edge_ll_device.upload import Uploads

log = logging.getLogger(__name__)

_INBOX = 1000
_IDLE_S = 0.05
_STATUS_S = 10.0


def last_will(config: AgentConfig, session: str) -> Will:
    """What the broker says for an agent that vanishes."""
    topic = Status.topic(Address(config.tenant, config.device))
    return Will(topic, Status(online=False, session=session).encode(), retain=Status.retain)


class Agent:
    """One device's agent.

    Args:
        config: What it is told.
        transport: Not connected yet, with :func:`last_will`.
        store: Its folder.
        session: 16 hexadecimal digits, new at each start.
        clock: Seconds since 1970.

    Raises:
        DataError: The configured stream cannot be read, or the state cannot be kept.
    """

    def __init__(
        self,
        config: AgentConfig,
        transport: Transport,
        store: Store,
        *,
        session: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._address = Address(config.tenant, config.device)
        self._transport = transport
        self._store = store
        self._session = session
        self._inbox: queue.Queue[Message | None] = queue.Queue(_INBOX)
        self._outbox = Outbox(store.outbox, self._address)
        self._reporter = Reporter(self._outbox, session=session, clock=clock)
        self._uploads = Uploads(store, self._send)
        self._deployment = Deployment(
            config, store, self._reporter, send=self._send, activated=self._activated
        )
        self._recorded = RecordedStream(Path(config.stream.file)) if config.stream else None
        self._stream: Iterator[Sample] | None = None
        self._next: Sample | None = None
        self._next_batch_s = 0.0
        self._next_status_s = 0.0
        self._stopping = False

    def stop(self) -> None:
        """End :meth:`run` soon; safe in a signal handler."""
        self._stopping = True

    def run(self, *, connect_timeout_s: float = 5.0) -> None:
        """Work until :meth:`stop`."""
        log.info("agent.started", extra={"device": self._address.device, "session": self._session})
        for kind in (Offer, Chunk, Command, UpdateRequest):
            self._transport.subscribe(kind.topic(self._address), self._receiver(kind))
        self._transport.on_connect(lambda: self._inbox.put(None))
        self._deployment.resume()
        if self._deployment.student is not None:
            self._open_stream(skip=self._deployment.student.tally.taken)
        try:
            self._transport.connect(connect_timeout_s)
        except TransportError as error:
            log.warning("broker.unreachable", extra={"reason": str(error)})
        try:
            while not self._stopping:
                self._turn()
        finally:
            self._deployment.save()
            self._send(Status(online=False, session=self._session))
            self._outbox.drain(self._transport)
            self._save_status()
            self._outbox.close()
            log.info("agent.stopped", extra={"device": self._address.device})

    def _turn(self) -> None:
        """One round of everything that may be due."""
        student = self._deployment.student
        due = self._next is not None and time.monotonic() >= self._next_batch_s
        self._read_inbox(wait_s=0.0 if due else _IDLE_S)
        self._deployment.turn()
        self._outbox.drain(self._transport)
        if due and student is not None and student is self._deployment.student:
            self._take_batch(student)
        if time.monotonic() >= self._next_status_s:
            self._save_status()

    # What comes in

    def _receiver(self, kind: type[Message]) -> Callable[[Received], None]:
        def receive(received: Received) -> None:
            try:
                self._inbox.put_nowait(kind.decode(received.payload))
            except ProtocolError as error:
                log.warning("message.refused", extra={"reason": str(error)})
            except queue.Full:
                log.warning("inbox.full", extra={"dropped": kind.__name__})

        return receive

    def _read_inbox(self, *, wait_s: float) -> None:
        try:
            message = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while True:
                self._handle(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _handle(self, message: Message | None) -> None:
        match message:
            case None:
                self._outbox.reconnected()
                self._greet()
            case Offer():
                # The fleet offers whenever it (re)connects: it hears us now.
                self._outbox.fleet_is_back()
                self._deployment.consider(message)
            case UpdateRequest():
                self._uploads.request(message)
            case Chunk():
                self._deployment.accept(message)
            case Command():
                self._uploads.command(message, self._deployment.student)
            case _:
                log.warning("message.unexpected", extra={"kind": type(message).__name__})

    # What goes out

    def _send(self, message: Message) -> None:
        """Publish now, or not at all: for what is worthless later or will be asked for again."""
        try:
            self._transport.publish(
                message.topic(self._address), message.encode(), retain=message.retain
            )
        except TransportError as error:
            log.info("not.sent", extra={"kind": type(message).__name__, "reason": str(error)})

    def _greet(self) -> None:
        """Say who is here, at each connection and each new bundle."""
        student = self._deployment.student
        info = student.learner.engine.info if student else None
        self._send(Status(online=True, session=self._session))
        self._send(
            Birth(
                session=self._session,
                agent_version=__version__,
                engine=info.name if info else "none",
                provider=info.provider if info else "none",
                runtime=info.runtime if info else "none",
                python=platform.python_version(),
                machine=f"{platform.system()} {platform.machine()}",
                rss_bytes=peak_rss_bytes(),
                bundle=student.ref if student else None,
                placements=_placements(student) if student else (),
            )
        )

    def _activated(self, first: bool) -> None:  # noqa: FBT001
        self._greet()
        student = self._deployment.student
        if student is None:
            return
        self._reporter.report(student, "baseline" if first else "activated")
        self._save_status()
        if first:
            self._open_stream(skip=0)

    # Local samples

    def _open_stream(self, *, skip: int) -> None:
        if self._recorded is not None:
            self._stream = self._recorded.samples(skip)
            self._next = next(self._stream, None)

    def _take_batch(self, student: Student) -> None:
        """Predict and learn one batch of one experience; report when that is due."""
        batch = self._next_batch(student.bundle.manifest.learner.batch_new)
        before, calm = student.tally.seen, not student.drift.alarm
        student.take(batch)
        if calm and student.drift.alarm:
            self._reporter.event("drift", f"inputs look new since sample {student.tally.taken}")
        every = self._config.report_every_samples
        if self._next is None or self._next.experience != student.tally.experience:
            self._finish_experience(student)
        elif student.tally.seen // every != before // every:
            self._reporter.report(student, "progress")
            self._save_status()
        pause_s = self._config.stream.interval_s if self._config.stream else 0.0
        self._next_batch_s = time.monotonic() + pause_s

    def _next_batch(self, size: int) -> list[Sample]:
        batch: list[Sample] = []
        while self._next is not None and self._stream is not None and len(batch) < size:
            if batch and self._next.experience != batch[0].experience:
                break
            batch.append(self._next)
            self._next = next(self._stream, None)
        return batch

    def _finish_experience(self, student: Student) -> None:
        # Report, then save: a crash in between repeats the report, which is harmless.
        self._reporter.report(student, "experience")
        if self._next is None:
            self._reporter.event("stream_ended", f"{student.tally.taken} samples taken")
            log.info("stream.ended", extra={"taken": student.tally.taken})
        self._deployment.save()
        self._next_status_s = 0.0

    def _save_status(self) -> None:
        """What ``edge-ll-agent status`` shows."""
        student = self._deployment.student
        status: dict[str, object] = {
            "device": self._config.device,
            "tenant": self._config.tenant,
            "broker_connected": self._transport.connected,
            "waiting_reports": len(self._outbox),
            "pulling": self._deployment.waits_for,
            "rss_bytes": peak_rss_bytes(),
            "bundle": None,
        }
        if student is not None:
            info = student.learner.engine.info
            status |= {
                "bundle": f"{student.ref.name} {student.ref.version}",
                "digest": student.ref.digest,
                "engine": info.name,
                "provider": info.provider,
                "runtime": info.runtime,
                "placements": _placements(student),
                "classes": [
                    student.bundle.manifest.labels[c] for c in student.learner.known_classes
                ],
                "tally": student.tally,
                "steps": student.learner.steps,
                "replay_entries": len(student.learner.buffer),
                "anchors": student.learner.anchor_counts(),
                "drift": student.drift.evidence(),
                "learning": self._why(),
            }
        self._store.save_status(status)
        self._next_status_s = time.monotonic() + _STATUS_S

    def _why(self) -> str:
        """Why it is, or is not, learning now."""
        if self._config.stream is None:
            return "no: no stream is configured"
        return "yes: the stream goes on" if self._next is not None else "no: the stream has ended"


def _placements(student: Student) -> tuple[Placement, ...]:
    """What the engine says about each of its graphs, as messages carry it."""
    return tuple(Placement(**p._asdict()) for p in student.learner.engine.info.placements)
