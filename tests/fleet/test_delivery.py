import threading

import pytest

pytest.importorskip("sqlalchemy", reason="the fleet extra is not installed")

from edge_ll.errors import TransportError
from edge_ll.fleet.delivery import ChunkServer, Offers
from edge_ll.fleet.ingest import Received
from edge_ll.fleet.publishing import publish_bundle
from edge_ll.messages import Chunk, ChunkRequest

pytestmark = pytest.mark.fleet


class SlowTransport:
    """Takes messages at once and acknowledges them when ``release`` is set."""

    def __init__(self):
        self.sent = []
        self.release = threading.Event()
        self.offline = False

    def publish(self, topic, payload, *, qos=1, retain=False):
        if self.offline:
            raise TransportError("offline")
        self.sent.append((topic, payload))
        return self

    def wait(self, timeout_s):
        return self.release.wait(timeout_s)


@pytest.fixture
def pushed(registry, tmp_path, make_bundle, trust):
    return publish_bundle(registry, tmp_path, make_bundle(), trust=trust, tenant="home")


def test_a_flood_of_requests_keeps_one_waiting_per_device(registry, tmp_path, pushed, wait_for):
    transport = SlowTransport()
    server = ChunkServer(transport, registry, tenant="home", folder=tmp_path)
    server.start()

    def ask(device, *indices):
        message = ChunkRequest(digest=pushed.digest, indices=indices)
        server.request(Received(device, message, b"", retained=False))

    ask("hub", 0)
    wait_for(lambda: transport.sent)  # its acknowledgement is out
    for _ in range(200):
        ask("hub", 1)
    ask("hub", 2)
    ask("other", 0)
    transport.release.set()
    wait_for(lambda: len(transport.sent) == 3)
    server.stop()
    served = [(topic.split("/")[4], Chunk.decode(data).index) for topic, data in transport.sent]
    assert served == [("hub", 0), ("hub", 2), ("other", 0)]


def test_a_file_that_vanished_ends_no_thread(registry, tmp_path, pushed, wait_for, caplog):
    transport = SlowTransport()
    transport.release.set()
    server = ChunkServer(transport, registry, tenant="home", folder=tmp_path)
    server.start()
    file = tmp_path / "bundles" / f"{pushed.digest}.bundle"
    kept = file.read_bytes()
    file.unlink()
    message = ChunkRequest(digest=pushed.digest, indices=(0,))
    server.request(Received("hub", message, b"", retained=False))
    wait_for(lambda: "chunks.failed" in caplog.messages)
    file.write_bytes(kept)
    server.request(Received("hub", message, b"", retained=False))
    wait_for(lambda: transport.sent)
    server.stop()


def test_an_offer_stays_due_until_it_was_handed_over(registry, pushed, make_birth):
    transport = SlowTransport()
    transport.offline = True
    offers = Offers(transport, registry, tenant="home")
    registry.record_birth("home", "hub", make_birth())
    offers.device("hub")
    offers.tick()
    assert transport.sent == []
    transport.offline = False
    offers.tick()
    offers.tick()
    assert [topic for topic, _ in transport.sent] == ["el/v1/home/d/hub/desired"]
