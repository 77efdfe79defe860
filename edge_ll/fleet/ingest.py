"""From topics to the registry: decode, check, count what is refused, keep the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from edge_ll import transport
from edge_ll.errors import EdgeLLError, ProtocolError
from edge_ll.fleet.analysis import drift_alarms_due
from edge_ll.fleet.registry import Registry
from edge_ll.messages import (
    MAX_MESSAGE_BYTES,
    Address,
    Birth,
    Event,
    Message,
    Report,
    Reported,
    Status,
)

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

_MAX_INTEGER = 2**63 - 1  # what SQLite can hold
_NOBODY = "?"  # counted under this name: a topic level that cannot be a device


@dataclass(frozen=True)
class Received(Generic[M]):
    """A message that kept every rule; the device is the one that the broker let publish there."""

    device: str
    message: M
    payload: bytes
    retained: bool


class UnwantedError(ProtocolError):
    """A well-formed message that is refused; ``reason`` is one of a few fixed texts, to count."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Inbox:
    """Subscriptions to a tenant's devices; nothing that a device sends makes it raise."""

    def __init__(self, port: transport.Transport, registry: Registry, *, tenant: str) -> None:
        self._transport = port
        self._registry = registry
        self._tenant = tenant
        self._open = True

    def on(self, kind: type[M], handler: Callable[[Received[M]], None]) -> None:
        """Call ``handler`` for every good message of ``kind`` from any device.

        The handler may raise :class:`UnwantedError`; that is counted like a malformed payload.
        """

        def take(message: transport.Message) -> None:
            if self._open:
                self._take(kind, handler, message)

        self._transport.subscribe(kind.topic_filter(self._tenant), take)

    def close(self) -> None:
        """Ignore what comes from now on."""
        self._open = False

    def _take(
        self, kind: type[M], handler: Callable[[Received[M]], None], raw: transport.Message
    ) -> None:
        if kind.retain and not raw.payload:
            return  # MQTT's way to delete a retained message
        device = _NOBODY
        try:
            device = Address.of(raw.topic).device
            message = kind.decode(raw.payload)
            handler(Received(device, message, raw.payload, raw.retained))
        except UnwantedError as error:
            self._reject(device, f"{kind.suffix}: {error.reason}", str(error))
        except ProtocolError as error:
            large = len(raw.payload) > MAX_MESSAGE_BYTES
            what = "bad device name" if device == _NOBODY else "too large" if large else "malformed"
            self._reject(device, f"{kind.suffix}: {what}", str(error))
        except (EdgeLLError, OSError):
            log.exception("fleet.ingest_failed", extra={"device": device, "kind": kind.suffix})

    def _reject(self, device: str, reason: str, detail: str) -> None:
        try:
            count = self._registry.reject(self._tenant, device, reason)
        except EdgeLLError:
            log.exception("fleet.ingest_failed", extra={"device": device, "reason": reason})
            return
        if count & (count - 1) == 0:  # 1, 2, 4, 8...: a flood of bad messages is no flood of lines
            fields = {"device": device, "reason": reason, "detail": detail, "count": count}
            log.warning("fleet.rejected", extra=fields)


class Ingest:
    """Keeps what devices tell about themselves.

    Args:
        registry: Where it is kept.
        tenant: Whose devices.
        on_device: Called with a device that has just come, or was unknown until now.
    """

    def __init__(
        self, registry: Registry, *, tenant: str, on_device: Callable[[str], None]
    ) -> None:
        self._registry = registry
        self._tenant = tenant
        self._on_device = on_device

    def listen(self, inbox: Inbox) -> None:
        """Subscribe to everything that is only kept."""
        inbox.on(Birth, self._birth)
        inbox.on(Status, self._status)
        inbox.on(Report, self._report)
        inbox.on(Event, self._event)
        inbox.on(Reported, self._reported)

    def _birth(self, got: Received[Birth]) -> None:
        self._registry.record_birth(self._tenant, got.device, got.message)
        log.info(
            "device.birth", extra={"device": got.device, "agent_version": got.message.agent_version}
        )
        self._on_device(got.device)

    def _status(self, got: Received[Status]) -> None:
        new = self._registry.record_status(
            self._tenant, got.device, got.message, retained=got.retained
        )
        if new:
            # Its birth came while no server listened: births are not retained.
            self._on_device(got.device)

    def _report(self, got: Received[Report]) -> None:
        report = got.message
        self._registry.record_report(self._tenant, got.device, report, got.payload)
        for signal in drift_alarms_due(report):
            self._alarm(got.device, report, signal)

    def _alarm(self, device: str, report: Report, signal: str) -> None:
        evidence = report.evidence[signal]
        fresh = self._registry.raise_alarm(
            self._tenant, device, signal, report=report, evidence=evidence
        )
        if fresh:
            fields = {
                "device": device,
                "signal": signal,
                "evidence": round(evidence.peak, 3),
                "threshold": round(evidence.threshold, 3),
                "n": evidence.n,
                "bundle_version": report.bundle.version,
            }
            log.warning("drift.alarm", extra=fields)

    def _event(self, got: Received[Event]) -> None:
        if self._registry.record_event(self._tenant, got.device, got.message):
            fields = {"device": got.device, "kind": got.message.kind, "detail": got.message.detail}
            log.info("device.event", extra=fields)

    def _reported(self, got: Received[Reported]) -> None:
        new = self._registry.record_reported(
            self._tenant, got.device, got.message, retained=got.retained
        )
        if got.message.state == "refused" and not got.retained:
            fields = {"device": got.device, "detail": got.message.detail}
            log.warning("bundle.refused", extra=fields)
        if new:
            self._on_device(got.device)
