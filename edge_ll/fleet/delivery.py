"""Fleet to device: offers of the desired bundle, and the bundle's chunks."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from edge_ll.errors import EdgeLLError, TransportError
from edge_ll.fleet.ingest import Received, UnwantedError
from edge_ll.fleet.publishing import BUNDLES
from edge_ll.fleet.registry import Registry
from edge_ll.fleet.rows import BundleRow, DesiredRow
from edge_ll.messages import CHUNK_BYTES, Address, Chunk, ChunkRequest, Offer
from edge_ll.transfer import read_chunk
from edge_ll.transport import Transport

log = logging.getLogger(__name__)

_ACKNOWLEDGE_S = 10.0
_STOP_S = 5.0


class Offers:
    """Keeps every device's retained offer equal to what is desired.

    A device is *due* until its offer was handed to the broker; being offline only delays it.
    """

    def __init__(self, port: Transport, registry: Registry, *, tenant: str) -> None:
        self._transport = port
        self._registry = registry
        self._tenant = tenant
        self._lock = threading.Lock()
        self._due: set[str] = set()
        self._seen: DesiredRow | None = None

    def everyone(self) -> None:
        """Offer to every known device again: the broker may have lost what it retained."""
        with self._lock:
            self._due.update(row.device for row in self._registry.devices(self._tenant))
            self._publish()

    def device(self, device: str) -> None:
        """Offer to one device."""
        with self._lock:
            self._due.add(device)
            self._publish()

    def tick(self) -> None:
        """Notice a change, also one by another process, and finish what is due."""
        with self._lock:
            desired = self._registry.desired(self._tenant)
            if desired != self._seen:
                self._due.update(row.device for row in self._registry.devices(self._tenant))
                self._seen = desired
            if self._due:
                self._publish()

    def _publish(self) -> None:
        # Under the lock, so that an older offer never overtakes a newer one.
        desired = self._registry.desired(self._tenant)
        row = self._registry.bundle(desired.digest) if desired else None
        if row is None:
            self._due.clear()  # the first push makes everyone due
            return
        offer = Offer(bundle=row.ref, size_bytes=row.size_bytes).encode()
        for device in sorted(self._due):
            topic = Offer.topic(Address(self._tenant, device))
            try:
                self._transport.publish(topic, offer, retain=True)
            except TransportError as error:
                log.debug("offer.delayed", extra={"device": device, "reason": str(error)})
                return
            self._due.discard(device)
            log.info("bundle.offered", extra={"device": device, "version": row.version})


class ChunkServer:
    """Answers requests for chunks, on a thread of its own.

    Each device has one request waiting, and a newer one takes its place; the next request is
    served when the broker has the chunks of the last. So a flood of requests costs neither memory
    nor the time of other messages, and a device that misses chunks asks again anyway.
    """

    def __init__(self, port: Transport, registry: Registry, *, tenant: str, folder: Path) -> None:
        self._transport = port
        self._registry = registry
        self._tenant = tenant
        self._bundles = folder / BUNDLES
        self._waiting: dict[str, tuple[ChunkRequest, BundleRow]] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="fleet-chunks", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the request in hand."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_STOP_S)

    def request(self, got: Received[ChunkRequest]) -> None:
        """Take a request.

        Raises:
            UnwantedError: For a bundle that is not registered, or chunks past its end.
        """
        row = self._registry.bundle(got.message.digest)
        if row is None:
            raise UnwantedError("unknown digest", f"no bundle {got.message.digest} is registered")
        chunks = -(-row.size_bytes // CHUNK_BYTES)
        last = max(got.message.indices)
        if last >= chunks:
            raise UnwantedError(
                "index past the end", f"chunk {last} of a bundle of {chunks} chunks"
            )
        with self._changed:
            self._waiting[got.device] = (got.message, row)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                device = next(iter(self._waiting))
                request, row = self._waiting.pop(device)
            try:
                self._serve(device, request, row)
            except TransportError as error:
                log.debug("chunks.delayed", extra={"device": device, "reason": str(error)})
            except (OSError, EdgeLLError):
                log.exception("chunks.failed", extra={"device": device, "file": row.file})

    def _serve(self, device: str, request: ChunkRequest, row: BundleRow) -> None:
        topic = Chunk.topic(Address(self._tenant, device))
        delivery = None
        for index in dict.fromkeys(request.indices):
            data = read_chunk(self._bundles / row.file, index)
            chunk = Chunk(digest=row.digest, index=index, data=data)
            delivery = self._transport.publish(topic, chunk.encode())
        if delivery is not None:
            delivery.wait(_ACKNOWLEDGE_S)
