"""One round: ask devices for what they learned, and pull their tails."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from edge_ll.errors import BundleError, EdgeLLError, ProtocolError, TransportError
from edge_ll.fleet.ingest import Inbox, Received, UnwantedError
from edge_ll.fleet.merge import TailUpdate
from edge_ll.fleet.publishing import UPDATES
from edge_ll.fleet.registry import Registry
from edge_ll.fleet.rows import BundleRow, UpdateRow
from edge_ll.manifest import Manifest
from edge_ll.messages import (
    Address,
    Command,
    CommandResult,
    UpdateChunk,
    UpdateOffer,
    UpdateRequest,
)
from edge_ll.transfer import Puller, Receiver
from edge_ll.transport import Transport

log = logging.getLogger(__name__)

WINDOW = 4
STALL_S = 2.0


@dataclass(frozen=True)
class CollectResult:
    """Tails that came, by device name, and why the others did not."""

    updates: tuple[TailUpdate, ...]
    missing: dict[str, str] = field(default_factory=dict)


@dataclass
class _Turn:
    """One device's part in a round; over when it has an update or a failure."""

    command: str
    asked_s: float = 0.0
    offer: UpdateOffer | None = None
    puller: Puller | None = None
    update: TailUpdate | None = None
    failure: str | None = None

    @property
    def over(self) -> bool:
        return self.update is not None or self.failure is not None


class Collector:
    """Runs rounds, one at a time; its handlers come from the inbox, its tick from the server."""

    def __init__(
        self,
        port: Transport,
        registry: Registry,
        *,
        tenant: str,
        folder: Path,
        clock: Callable[[], float],
        steady: Callable[[], float],
    ) -> None:
        self._transport = port
        self._registry = registry
        self._tenant = tenant
        self._folder = folder / UPDATES
        self._clock = clock
        self._steady = steady
        self._round = threading.Lock()
        # Guards the two below; notified when a turn is over.
        self._changed = threading.Condition()
        self._turns: dict[str, _Turn] = {}
        self._base: tuple[str, Manifest] | None = None

    def listen(self, inbox: Inbox) -> None:
        """Subscribe to the answers."""
        inbox.on(CommandResult, self._on_result)
        inbox.on(UpdateOffer, self._on_offer)
        inbox.on(UpdateChunk, self._on_chunk)

    def collect(
        self, devices: Sequence[str], base: BundleRow, *, timeout_s: float
    ) -> CollectResult:
        """Ask each device for its tail and wait; never call it from a handler.

        Args:
            devices: Whom to ask.
            base: The bundle that the tails must be learned on.
            timeout_s: For the whole round, in seconds.
        """
        with self._round:
            manifest = base.manifest()
            turns = {device: _Turn(command=secrets.token_hex(8)) for device in devices}
            with self._changed:
                self._turns, self._base = turns, (base.digest, manifest)
            for device, turn in turns.items():
                self._command(device, turn)
            self._wait(turns, timeout_s)
            # The turns stay until the next round, to tell what is late from what is unwanted.
            with self._changed:
                for turn in turns.values():
                    if not turn.over:
                        what = "no answer" if turn.offer is None else "its update was not whole"
                        self._fail(turn, f"{what} after {timeout_s:g} s")
                return _result(turns)

    def tick(self) -> None:
        """Ask again for what did not come: the offer, or chunks of it."""
        with self._changed:
            for device, turn in self._turns.items():
                if turn.over:
                    continue
                if turn.puller is not None:
                    turn.puller.tick(self._steady())
                elif self._steady() - turn.asked_s >= STALL_S:
                    self._command(device, turn)

    def _wait(self, turns: Mapping[str, _Turn], timeout_s: float) -> None:
        deadline = self._steady() + timeout_s
        with self._changed:
            while not all(turn.over for turn in turns.values()):
                left = deadline - self._steady()
                if left <= 0:
                    return
                self._changed.wait(min(left, 1.0))

    def _command(self, device: str, turn: _Turn) -> None:
        command = Command(id=turn.command, verb="upload")
        turn.asked_s = self._steady()
        try:
            topic = Command.topic(Address(self._tenant, device))
            self._transport.publish(topic, command.encode())
        except TransportError as error:  # the next stall asks again
            log.debug("command.delayed", extra={"device": device, "reason": str(error)})
        except ProtocolError as error:
            self._fail(turn, f"the command could not be sent: {error}")

    def _on_result(self, got: Received[CommandResult]) -> None:
        with self._changed:
            turn = self._turns.get(got.device)
            mine = turn is not None and got.message.id == turn.command
            if turn is not None and mine and not turn.over and not got.message.ok:
                self._fail(turn, f"the device refused: {got.message.detail or 'no reason given'}")

    def _on_offer(self, got: Received[UpdateOffer]) -> None:
        offer = got.message
        with self._changed:
            turn = self._turns.get(got.device)
            if turn is None or self._base is None or offer.command != turn.command:
                raise UnwantedError("not asked for", f"no command {offer.command} is open")
            if offer == turn.offer:
                return  # delivered twice
            if turn.over:
                raise UnwantedError("too late", "this device's part in the round is over")
            if turn.offer is not None:
                raise UnwantedError("a second one", "one update per device and round")
            turn.offer = offer
            digest, manifest = self._base
            refusal = _refusal(offer, digest, manifest)
            if refusal is not None:
                self._fail(turn, refusal[1])
                raise UnwantedError(*refusal)
            turn.puller = self._puller(got.device, offer)
            if turn.puller.complete:  # kept from a round that ended too early
                self._finish(got.device, turn, turn.puller)
            turn.puller.tick(self._steady())

    def _puller(self, device: str, offer: UpdateOffer) -> Puller:
        # A folder for each device: two devices may offer the same bytes.
        folder = self._folder / self._tenant / device
        receiver = Receiver(folder, digest=offer.digest, size_bytes=offer.size_bytes)
        request = partial(self._request, device, offer.digest)
        return Puller(receiver, request, window=WINDOW, stall_s=STALL_S)

    def _request(self, device: str, digest: str, indices: tuple[int, ...]) -> None:
        message = UpdateRequest(digest=digest, indices=indices)
        topic = UpdateRequest.topic(Address(self._tenant, device))
        try:
            self._transport.publish(topic, message.encode())
        except TransportError as error:  # the next stall asks again
            log.debug("update.delayed", extra={"device": device, "reason": str(error)})

    def _on_chunk(self, got: Received[UpdateChunk]) -> None:
        chunk = got.message
        with self._changed:
            turn = self._turns.get(got.device)
            if turn is None or turn.offer is None or turn.offer.digest != chunk.digest:
                raise UnwantedError("not asked for", f"no update {chunk.digest} is open")
            if turn.over or turn.puller is None:
                return  # a late repetition
            turn.puller.accept(chunk.index, chunk.data, self._steady())
            if turn.puller.complete:
                self._finish(got.device, turn, turn.puller)

    def _finish(self, device: str, turn: _Turn, puller: Puller) -> None:
        offer = turn.offer
        if offer is None:
            return
        name = f"{self._tenant}/{device}/{offer.digest}.f32"
        path = self._folder / name
        try:
            puller.receiver.finish(path)
            theta = np.frombuffer(path.read_bytes(), "<f4").astype(np.float32)
            if not np.isfinite(theta).all():
                path.unlink()
                raise ProtocolError("its tail holds values that are not finite")
            self._record(device, offer, name)
        except (OSError, EdgeLLError) as error:
            self._fail(turn, str(error))
            return
        turn.update = TailUpdate(device, theta, offer.samples, tuple(sorted(set(offer.classes))))
        log.info("update.received", extra={"device": device, "samples": offer.samples})
        self._changed.notify_all()

    def _record(self, device: str, offer: UpdateOffer, file: str) -> None:
        row = UpdateRow(
            tenant=self._tenant,
            device=device,
            base_digest=offer.base,
            digest=offer.digest,
            samples=offer.samples,
            classes=offer.classes,
            received_s=self._clock(),
            file=file,
        )
        self._registry.record_update(row)

    def _fail(self, turn: _Turn, reason: str) -> None:
        with self._changed:
            turn.failure = turn.failure or reason
            self._changed.notify_all()


def require_desired(registry: Registry, tenant: str) -> BundleRow:
    """The desired bundle's row.

    Raises:
        BundleError: Nothing was pushed yet.
    """
    desired = registry.desired(tenant)
    row = registry.bundle(desired.digest) if desired else None
    if row is None:
        raise BundleError(
            f"tenant {tenant!r} has no desired bundle yet; push one: edge-ll push BUNDLE"
        )
    return row


def _refusal(offer: UpdateOffer, base: str, manifest: Manifest) -> tuple[str, str] | None:
    """Why an offer is not pulled: a text to count, and one for people."""
    size_bytes = 4 * manifest.theta_size
    if offer.base != base:
        return "wrong base", f"learned on bundle {offer.base[:12]}, expected {base[:12]}"
    if offer.size_bytes != size_bytes:
        return "wrong size", f"expected a tail of {size_bytes} bytes, got {offer.size_bytes}"
    if offer.samples < 1:
        return "no samples", "it was learned from no sample"
    if any(index >= manifest.capacity for index in offer.classes):
        return (
            "wrong classes",
            f"expected classes 0 to {manifest.capacity - 1}, got up to {max(offer.classes)}",
        )
    return None


def _result(turns: Mapping[str, _Turn]) -> CollectResult:
    updates, missing = [], {}
    for device, turn in sorted(turns.items()):
        if turn.update is not None:
            updates.append(turn.update)
        else:
            missing[device] = turn.failure or "its part was not over"
            log.warning("update.missing", extra={"device": device, "reason": missing[device]})
    return CollectResult(tuple(updates), missing)
