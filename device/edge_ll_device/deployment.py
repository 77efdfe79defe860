"""Which bundle runs here: takes an offer, pulls it, verifies it, and switches only then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from edge_ll.engine.load import open_engine
from edge_ll.errors import BundleError, EdgeLLError
from edge_ll.messages import BundleRef, Chunk, ChunkRequest, Message, Offer
from edge_ll.transfer import Puller, Receiver
from edge_ll_device.config import AgentConfig
from edge_ll_device.reporter import Reporter
from edge_ll_device.store import Store
from edge_ll_device.student import Student

log = logging.getLogger(__name__)


class Deployment:
    """Owns the running student.

    Args:
        config: The agent's.
        store: Where bundles lie.
        reporter: Told what became of an offer.
        send: Sends a message now, or not at all.
        activated: Called after a switch, with whether it was the first bundle ever.
    """

    def __init__(
        self,
        config: AgentConfig,
        store: Store,
        reporter: Reporter,
        *,
        send: Callable[[Message], None],
        activated: Callable[[bool], None],
    ) -> None:
        self._config = config
        self._store = store
        self._reporter = reporter
        self._send = send
        self._activated = activated
        self._pulling: tuple[Offer, Puller] | None = None
        self.student: Student | None = None

    @property
    def waits_for(self) -> str | None:
        """What is being pulled, for people; None where nothing is."""
        if self._pulling is None:
            return None
        offer, puller = self._pulling
        receiver = puller.receiver
        return f"{offer.bundle.name} {offer.bundle.version}: {receiver.arrived}/{receiver.chunks}"

    def resume(self) -> None:
        """Run what ran before the last stop, with what it had learned."""
        try:
            digest = self._store.current()
            if digest is None:
                return
            student = self._build(digest)
        except EdgeLLError as error:
            # Without a student the agent waits for an offer, and the fleet sends one at birth.
            log.error("resume.failed", extra={"reason": str(error)})  # noqa: TRY400
            return
        try:
            learned = self._store.load_learned(digest)
            if learned is not None:
                student.restore(learned)
        except EdgeLLError as error:
            log.error("learning.lost", extra={"reason": str(error)})  # noqa: TRY400
        self.student = student
        log.info("resumed", extra={"bundle": student.ref.name, "taken": student.tally.taken})

    def save(self) -> None:
        """Keep what the student has learned."""
        if self.student is not None:
            self._store.save_learned(self.student.bundle.digest, self.student.learned())

    def consider(self, offer: Offer) -> None:
        """Pull what is offered, unless it runs already or something newer does."""
        wanted = offer.bundle
        running = self.student.ref if self.student else None
        if self._pulling and self._pulling[0].bundle.digest == wanted.digest:
            return
        if self._pulling:
            # The fleet has changed its mind; disks here are small.
            self._pulling[1].receiver.discard()
            self._pulling = None
        if running and wanted.digest == running.digest:
            self._reporter.state(wanted, "active")
            return
        if running and wanted.name == running.name and wanted.version <= running.version:
            self._refuse(wanted, f"version {running.version} runs; offered {wanted.version}")
            return
        receiver = Receiver(self._store.incoming, digest=wanted.digest, size_bytes=offer.size_bytes)

        def request(indices: tuple[int, ...]) -> None:
            self._send(ChunkRequest(digest=wanted.digest, indices=indices))

        self._pulling = offer, Puller(receiver, request)
        self._reporter.state(wanted, "pulling")

    def accept(self, chunk: Chunk) -> None:
        """Take a chunk of what is being pulled; others are ignored."""
        if self._pulling is None or chunk.digest != self._pulling[0].bundle.digest:
            return
        try:
            self._pulling[1].accept(chunk.index, chunk.data, time.monotonic())
        except EdgeLLError as error:
            log.warning("chunk.refused", extra={"reason": str(error)})

    def turn(self) -> None:
        """Ask for what is missing; switch when everything is here."""
        if self._pulling is None:
            return
        offer, puller = self._pulling
        puller.tick(time.monotonic())
        if not puller.complete:
            return
        self._pulling = None
        try:
            puller.receiver.finish(self._store.bundle_path(offer.bundle.digest))
            first = self._switch(offer.bundle)
        except EdgeLLError as error:
            self._store.drop_bundle(offer.bundle.digest)
            self._refuse(offer.bundle, str(error))
            return
        self._activated(first)

    def _switch(self, wanted: BundleRef) -> bool:
        """Verify, test, take over what was learned, and only then switch.

        Returns:
            Whether it is the first bundle ever.
        """
        student = self._build(wanted.digest)
        if student.ref != wanted:
            raise BundleError(
                f"offered {wanted.name} {wanted.version}, "
                f"the bundle is {student.ref.name} {student.ref.version}"
            )
        carried = student.adopt(self.student) if self.student else "nothing to take over"
        self._store.save_learned(wanted.digest, student.learned())
        self._store.set_current(wanted.digest)
        first, self.student = self.student is None, student
        log.info(
            "bundle.activated",
            extra={"bundle": wanted.name, "version": wanted.version, "carried_over": carried},
        )
        self._reporter.state(wanted, "active", carried)
        return first

    def _build(self, digest: str) -> Student:
        bundle = self._store.open_bundle(digest)
        runtime = self._config.runtime
        engine = open_engine(
            bundle,
            runtime.engine,
            providers=runtime.providers,
            threads=runtime.threads,
            spinning=runtime.spinning,
            arena=runtime.arena,
            arena_limit_bytes=runtime.arena_limit_bytes,
        )
        try:
            student = Student(bundle, engine, self._config.learning)
            student.self_test()
        except (ValueError, IndexError) as error:
            raise BundleError(f"the bundle's parts do not fit together: {error}") from error
        return student

    def _refuse(self, wanted: BundleRef, reason: str) -> None:
        log.warning("bundle.refused", extra={"bundle": wanted.name, "reason": reason})
        self._reporter.state(wanted, "refused", reason)
        self._reporter.event("bundle_refused", reason)
