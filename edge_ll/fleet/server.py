"""The fleet server: ties the inbox, the offers, the chunks and the rounds to one transport."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from edge_ll.bundle import Bundle
from edge_ll.errors import TrustError
from edge_ll.fleet.delivery import ChunkServer, Offers
from edge_ll.fleet.evaluation import Evaluate
from edge_ll.fleet.ingest import Inbox, Ingest
from edge_ll.fleet.merging import Merger, MergeResult
from edge_ll.fleet.publishing import BUNDLES, publish_bundle
from edge_ll.fleet.registry import Registry
from edge_ll.fleet.rounds import Collector, CollectResult, require_desired
from edge_ll.fleet.rows import BundleRow
from edge_ll.messages import BundleRef, ChunkRequest, check_level
from edge_ll.transport import Transport
from edge_ll.trust import Signer, TrustStore

log = logging.getLogger(__name__)

TICK_S = 0.25
_STOP_S = 5.0


class FleetServer:
    """One tenant's server. The caller owns, connects and closes the transport and the registry.

    Args:
        transport: How devices are reached.
        registry: What is known of them.
        tenant: Whose devices.
        folder: Data folder; ``bundles/`` and ``updates/`` lie below.
        trust: Who may have signed a bundle; without it nothing can be pushed or merged here.
        signer: Signs merged bundles; without it nothing can be merged.
        clock: Seconds since the epoch.
        steady: Seconds that never jump.

    Raises:
        ProtocolError: The tenant cannot be a topic level.
    """

    def __init__(
        self,
        transport: Transport,
        registry: Registry,
        *,
        tenant: str,
        folder: Path,
        trust: TrustStore | None,
        signer: Signer | None = None,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        check_level(tenant)
        self._transport = transport
        self._registry = registry
        self._tenant = tenant
        self._folder = folder
        self._trust = trust
        self._signer = signer
        self._clock = clock
        self._inbox = Inbox(transport, registry, tenant=tenant)
        self._offers = Offers(transport, registry, tenant=tenant)
        self._ingest = Ingest(registry, tenant=tenant, on_device=self._offers.device)
        self._chunks = ChunkServer(transport, registry, tenant=tenant, folder=folder)
        self._collector = Collector(
            transport, registry, tenant=tenant, folder=folder, clock=clock, steady=steady
        )
        self._stopping = threading.Event()
        self._loop = threading.Thread(target=self._run, name="fleet-loop", daemon=True)

    def start(self) -> None:
        """Subscribe and begin to serve; best called before the transport connects, and once."""
        self._ingest.listen(self._inbox)
        self._inbox.on(ChunkRequest, self._chunks.request)
        self._collector.listen(self._inbox)
        self._transport.on_connect(self._offers.everyone)
        self._chunks.start()
        self._loop.start()

    def stop(self) -> None:
        """Stop serving and wait for the threads; idempotent."""
        self._stopping.set()
        self._inbox.close()
        self._chunks.stop()
        if self._loop.is_alive():
            self._loop.join(_STOP_S)

    def push(self, path: Path) -> BundleRef:
        """Make a bundle the desired one and offer it to every device.

        Raises:
            BundleError: The file is damaged or unsafe.
            TrustError: It is not signed by a trusted key.
        """
        trust = self._need_trust()
        ref = publish_bundle(self._registry, self._folder, path, trust=trust, tenant=self._tenant)
        self._offers.tick()
        return ref

    def current_bundle(self) -> Bundle:
        """The desired bundle, verified again.

        Raises:
            BundleError: Nothing was pushed yet, or the file was damaged since.
            TrustError: No trusted key is configured, or none signed it.
        """
        return self._open(require_desired(self._registry, self._tenant))

    def collect_updates(self, devices: Sequence[str], *, timeout_s: float) -> CollectResult:
        """Ask devices for what they learned on the desired bundle, and wait for it.

        Raises:
            BundleError: Nothing was pushed yet.
        """
        row = require_desired(self._registry, self._tenant)
        return self._collector.collect(devices, row, timeout_s=timeout_s)

    def merge_round(
        self,
        devices: Sequence[str],
        evaluate: Evaluate,
        *,
        timeout_s: float,
        max_forgetting: float,
        norm_factor: float = 3.0,
    ) -> MergeResult:
        """Collect, merge, measure on a hold-out, and publish the result if it passes the gate.

        Args:
            devices: Whom to ask; those under a drift alarm on the desired bundle are left out.
            evaluate: Made for :meth:`current_bundle` by ``evaluation.holdout_evaluator``.
            timeout_s: For collecting, in seconds.
            max_forgetting: How much accuracy a known group may lose, as a share of 1.
            norm_factor: How many times the median a change may measure.

        Raises:
            BundleError: Nothing was pushed yet.
            TrustError: There is no key to sign with, or none that is trusted.
        """
        if self._signer is None:
            raise TrustError("merging needs a signing key; start the server with one")
        merger = Merger(
            self._registry,
            tenant=self._tenant,
            folder=self._folder,
            trust=self._need_trust(),
            signer=self._signer,
            clock=self._clock,
        )
        row = require_desired(self._registry, self._tenant)
        base = self._open(row)
        asked, alarmed = merger.without_alarms(devices, base.digest)
        collected = self._collector.collect(asked, row, timeout_s=timeout_s)
        result = merger.merge(
            base,
            collected,
            evaluate,
            max_forgetting=max_forgetting,
            norm_factor=norm_factor,
            left_out=alarmed,
        )
        self._offers.tick()
        return result

    def _open(self, row: BundleRow) -> Bundle:
        return Bundle.open(self._folder / BUNDLES / row.file, self._need_trust())

    def _need_trust(self) -> TrustStore:
        if self._trust is None:
            raise TrustError("no trusted key is configured; add the public key of your signer")
        return self._trust

    def _run(self) -> None:
        while not self._stopping.wait(TICK_S):
            try:
                self._offers.tick()
                self._collector.tick()
            except Exception:
                # The loop must outlive a full disk or a locked registry.
                log.exception("fleet.tick_failed")
