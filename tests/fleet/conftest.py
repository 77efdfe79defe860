"""Tiny signed bundles, a scripted device, and a server on the in-memory broker."""

import hashlib
import threading
import time

import numpy as np
import pytest

from edge_ll.bundle import write_bundle
from edge_ll.manifest import (
    DriftDefaults,
    LearnerDefaults,
    Manifest,
    Provenance,
    TensorSpec,
    ThetaEntry,
)
from edge_ll.messages import (
    CHUNK_BYTES,
    Address,
    Birth,
    BundleRef,
    Chunk,
    ChunkRequest,
    Command,
    CommandResult,
    Evidence,
    Offer,
    Report,
    Reported,
    UpdateChunk,
    UpdateOffer,
    UpdateRequest,
)
from edge_ll.metrics import Counts
from edge_ll.transport.memory import MemoryBroker, MemoryTransport
from edge_ll.trust import Signer, TrustStore

CLASSES, LATENT = 4, 4
SESSION = "0123456789abcdef"


def make_manifest(*, version=1, known=(0, 1), name="toy"):
    return Manifest(
        name=name,
        version=version,
        input=TensorSpec(shape=(LATENT,), dtype="float32"),
        latent=TensorSpec(shape=(LATENT,), dtype="float32"),
        labels=tuple("abcd"),
        base_classes=(0, 1),
        known_classes=known,
        theta=(ThetaEntry(name="w", offset=0, shape=(LATENT, CLASSES)),),
        engines=("step-graph",),
        learner=LearnerDefaults(
            optimizer="sgd",
            learning_rate=0.1,
            weight_decay=0.0,
            clip_norm=1.0,
            batch_new=1,
            batch_replay=1,
            steps_per_batch=1,
            buffer_entries=8,
        ),
        drift=DriftDefaults(average_run_length=1000.0),
        anchor_groups={"old": (0, 1), "new": (2, 3)},
        arrays={},
        files={},
        provenance=Provenance(recipe="toy", created_at_s=1.0, metrics={"teacher_acc": 0.9}),
    )


def tail(*diagonal):
    """A linear tail that sends one-hot latent i to class i as strongly as ``diagonal`` says."""
    return np.diag(np.asarray(diagonal, np.float32))


@pytest.fixture(scope="session")
def signer():
    return Signer.generate()


@pytest.fixture
def trust(signer):
    return TrustStore([signer.public_key])


@pytest.fixture
def make_bundle(tmp_path, signer):
    """Write a signed bundle; ``padding`` bytes make it span several chunks."""

    def make(*, version=1, theta=None, padding=2 * CHUNK_BYTES + 17, by=signer, known=(0, 1)):
        theta = tail(1, 1, 0, 0) if theta is None else theta
        path = tmp_path / f"toy-{version}.bundle"
        files = {
            "theta.f32": theta.astype("<f4").tobytes(),
            "padding.bin": bytes(range(256)) * (padding // 256),
        }
        write_bundle(path, make_manifest(version=version, known=known), files, by)
        return path

    return make


@pytest.fixture
def registry(tmp_path):
    from edge_ll.fleet.registry import Registry  # absent without the fleet extra

    registry = Registry(tmp_path / "fleet.sqlite3")
    yield registry
    registry.close()


@pytest.fixture
def broker():
    return MemoryBroker()


def report(
    seq=0,
    *,
    phase="progress",
    experience=0,
    anchors=None,
    digest="a" * 64,
    session=SESSION,
    peak=0.0,
    seen=0,
    prequential=(0, 0),
    version=1,
    rss_bytes=0,
):
    return Report(
        session=session,
        seq=seq,
        at_s=10.0 + seq,
        bundle=BundleRef(name="toy", version=version, digest=digest),
        phase=phase,
        experience=experience,
        seen=seen,
        learned=seen,
        steps=0,
        refused=0,
        prequential=Counts(*prequential),
        anchors={name: Counts(*counts) for name, counts in (anchors or {}).items()},
        evidence={"loss": Evidence(now=peak, peak=peak, threshold=6.9, n=seen)},
        rss_bytes=rss_bytes,
    )


@pytest.fixture
def make_report():
    return report


def birth(*, session=SESSION):
    return Birth(
        session=session,
        agent_version="0.1.0",
        engine="step-graph",
        provider="CPU",
        runtime="1.20",
        python="3.11",
        machine="x86_64",
        rss_bytes=1000,
    )


@pytest.fixture
def make_birth():
    return birth


class FakeDevice:
    """Speaks the device's side of the protocol; ``offer_with`` changes what it offers."""

    def __init__(self, broker, name, *, tenant="home"):
        self.name = name
        self.address = Address(tenant, name)
        self.transport = MemoryTransport(broker, client_id=f"device-{name}")
        self.offers = []
        self.chunks = {}
        self.theta = None
        self.samples = 10
        self.classes = (0, 1, 2, 3)
        self.offer_with = {}
        self.refuse = None
        self.update_requests = []
        self.twice = False
        self.deaf_once = False
        self.last_offer = None
        for kind, handler in (
            (Offer, self._offer),
            (Chunk, self._chunk),
            (Command, self._command),
            (UpdateRequest, self._update_request),
        ):
            self.transport.subscribe(
                kind.topic(self.address), lambda m, k=kind, h=handler: h(k.decode(m.payload))
            )
        self.transport.connect(1.0)

    def send(self, message):
        self.transport.publish(
            type(message).topic(self.address), message.encode(), retain=type(message).retain
        )

    def send_raw(self, kind, payload):
        self.transport.publish(kind.topic(self.address), payload)

    def ask(self, digest, *indices):
        self.send(ChunkRequest(digest=digest, indices=indices))

    def activate(self):
        offer = self.offers[-1]
        self.send(Reported(session=SESSION, bundle=offer.bundle, state="active"))

    def _offer(self, offer):
        self.offers.append(offer)

    def _chunk(self, chunk):
        self.chunks[chunk.index] = chunk.data

    def _command(self, command):
        if self.refuse is not None:
            self.send(CommandResult(id=command.id, ok=False, detail=self.refuse))
            return
        if self.theta is None:
            return
        data = self._bytes()
        fields = {
            "command": command.id,
            "base": self.offers[-1].bundle.digest,
            "digest": hashlib.sha256(data).hexdigest(),
            "size_bytes": len(data),
            "samples": self.samples,
            "classes": self.classes,
        }
        offer = UpdateOffer(**{**fields, **self.offer_with})
        self.last_offer = offer
        for _ in range(2 if self.twice else 1):
            self.send(offer)
        self.send(CommandResult(id=command.id, ok=True))

    def _update_request(self, request):
        self.update_requests.append(request)
        if self.deaf_once:
            self.deaf_once = False
            return
        data = self._bytes()
        for index in request.indices:
            part = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
            self.send(UpdateChunk(digest=request.digest, index=index, data=part))

    def _bytes(self):
        return np.asarray(self.theta, "<f4").tobytes()


@pytest.fixture
def make_device(broker):
    devices = []

    def make(name, **options):
        device = FakeDevice(broker, name, **options)
        devices.append(device)
        return device

    yield make
    for device in devices:
        device.transport.close()


@pytest.fixture
def make_tail():
    return tail


def wait_for(condition, timeout_s=5.0):
    """Wait until ``condition()`` is true; the assertion names it otherwise."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        pause.wait(0.01)


@pytest.fixture(name="wait_for")
def wait_for_fixture():
    return wait_for


@pytest.fixture
def transport(broker):
    transport = MemoryTransport(broker, client_id="fleet")
    yield transport
    transport.close()


@pytest.fixture
def server(transport, registry, tmp_path, trust, signer):
    from edge_ll.fleet.server import FleetServer

    server = FleetServer(
        transport, registry, tenant="home", folder=tmp_path / "data", trust=trust, signer=signer
    )
    server.start()
    transport.connect(1.0)
    yield server
    server.stop()
    assert transport.handler_errors == 0


@pytest.fixture
def rejected(registry):
    return lambda: {(row.device, row.reason): row.count for row in registry.rejected("home")}


@pytest.fixture
def ready(server, make_bundle, make_device, make_birth, wait_for):
    """Devices that were born and know the offer of a pushed bundle."""

    def make(*names, **options):
        ref = server.push(make_bundle(**options))
        devices = [make_device(name) for name in names]
        for device in devices:
            device.send(make_birth())
        wait_for(lambda: all(device.offers for device in devices))
        return ref, *devices

    return make
