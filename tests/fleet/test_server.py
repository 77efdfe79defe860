"""The server over the in-memory broker, with scripted devices."""

import logging
import math

import cbor2
import msgspec
import pytest

pytest.importorskip("sqlalchemy", reason="the fleet extra is not installed")

from edge_ll.bundle import Bundle
from edge_ll.errors import BundleError, ProtocolError, RegistryError, TrustError
from edge_ll.fleet.publishing import publish_bundle
from edge_ll.fleet.server import FleetServer
from edge_ll.messages import Birth, ChunkRequest, Event, Report, Reported, Status
from edge_ll.trust import Signer

pytestmark = pytest.mark.fleet

TENANT = "home"


def test_a_birth_is_answered_and_the_bundle_can_be_pulled(
    ready, registry, make_bundle, wait_for, trust, rejected
):
    ref, device = ready("hub")
    offer = device.offers[-1]
    assert offer.bundle == ref
    device.ask(ref.digest, 0, 1, 1)
    wait_for(lambda: len(device.chunks) == 2)
    device.ask(ref.digest, 2)
    wait_for(lambda: len(device.chunks) == 3)
    whole = b"".join(device.chunks[index] for index in range(3))
    assert len(whole) == offer.size_bytes
    assert Bundle.open(whole, trust).digest == ref.digest
    device.activate()
    wait_for(lambda: registry.device(TENANT, "hub").state == "active")
    assert registry.device(TENANT, "hub").bundle == ref
    assert rejected() == {}


def test_a_device_born_before_the_first_push_is_offered_it_then(
    server, make_bundle, make_device, make_birth, registry, wait_for
):
    device = make_device("hub")
    device.send(make_birth())
    wait_for(lambda: registry.device(TENANT, "hub"))
    assert not device.offers
    server.push(make_bundle())
    wait_for(lambda: device.offers)


def test_a_push_by_another_process_is_noticed(
    ready, registry, make_bundle, tmp_path, trust, wait_for
):
    _, device = ready("hub")
    path = make_bundle(version=2)
    ref = publish_bundle(registry, tmp_path / "data", path, trust=trust, tenant=TENANT)
    wait_for(lambda: device.offers[-1].bundle == ref)


def test_a_device_whose_birth_was_missed_is_found_by_its_status(
    server, make_bundle, make_device, wait_for
):
    server.push(make_bundle())
    device = make_device("hub")
    device.send(Status(online=True, session="0" * 16))
    wait_for(lambda: device.offers)


def test_offers_are_retained_and_come_again_after_the_broker_lost_them(
    ready, broker, wait_for, transport, make_device
):
    ready("hub")
    late = make_device("hub")  # takes the connection over, as after a crash
    wait_for(lambda: late.offers)
    late.offers.clear()
    broker.restart()
    wait_for(lambda: late.offers)
    late.offers.clear()
    transport.drop()
    transport.restore()
    wait_for(lambda: len(late.offers) >= 1)


def test_an_offer_made_while_offline_is_sent_after_the_reconnection(
    ready, server, transport, make_bundle, wait_for
):
    _, device = ready("hub")
    transport.drop()
    ref = server.push(make_bundle(version=2))
    transport.restore()
    wait_for(lambda: device.offers[-1].bundle == ref)


def test_reports_are_kept_once_and_an_alarm_is_raised_once(
    ready, registry, make_report, wait_for, caplog
):
    ref, device = ready("hub")
    with caplog.at_level(logging.WARNING, "edge_ll.fleet"):
        for seq in (0, 1, 1, 2):
            device.send(make_report(seq, digest=ref.digest, peak=5.0 + seq, seen=seq))
        wait_for(lambda: len(registry.reports(TENANT, "hub")) == 3)
        device.send(make_report(3, digest=ref.digest, peak=8.0, session="f" * 16))
        wait_for(lambda: len(registry.alarms(TENANT)) == 2)
    first, _ = registry.alarms(TENANT)
    assert (first.evidence, first.n) == (7.0, 2)
    alarms = [record for record in caplog.records if record.getMessage() == "drift.alarm"]
    assert [record.device for record in alarms] == ["hub", "hub"]


def test_malformed_and_oversized_payloads_are_counted_never_kept(
    ready, registry, make_report, wait_for, rejected, make_device
):
    _, device = ready("hub")
    good = msgspec.to_builtins(make_report())
    for payload in (
        b"",
        b"\xff" * 20,
        cbor2.dumps({**good, "seq": -1}),
        cbor2.dumps({**good, "seq": 2**63}),
        cbor2.dumps({**good, "seq": 2**80}),
        cbor2.dumps({**good, "at_s": math.nan}),
        cbor2.dumps({**good, "prequential": [3, 2]}),
        cbor2.dumps({**good, "evidence": {"x": {**good["evidence"]["loss"], "peak": math.inf}}}),
    ):
        device.send_raw(Report, payload)
    device.send_raw(Report, bytes(300_000))
    device.send_raw(Birth, b"{}")
    device.send_raw(Event, b'{"session": 1}')
    wait_for(lambda: ("hub", "event: malformed") in rejected())
    assert rejected() == {
        ("hub", "report: malformed"): 8,
        ("hub", "report: too large"): 1,
        ("hub", "birth: malformed"): 1,
        ("hub", "event: malformed"): 1,
    }
    device.transport.publish("el/v1/home/d/a b/report", b"x")
    wait_for(lambda: ("?", "report: bad device name") in rejected())
    assert registry.reports(TENANT, "hub") == []


def test_a_registry_that_fails_is_logged_and_the_next_message_is_taken(
    ready, registry, make_report, wait_for, monkeypatch, caplog
):
    _, device = ready("hub")

    def full(*_):
        raise RegistryError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "record_report", full)
        patch.setattr(registry, "reject", full)
        device.send(make_report(0))
        device.send_raw(Report, b"?")
        wait_for(lambda: caplog.messages.count("fleet.ingest_failed") == 2)
    device.send(make_report(1))
    wait_for(lambda: [row.seq for row in registry.reports(TENANT, "hub")] == [1])


def test_events_and_refusals_of_bundles_are_kept(ready, registry, wait_for):
    ref, device = ready("hub")
    device.send(Event(session="0" * 16, at_s=1.0, kind="stream_ended", detail="42 samples"))
    device.send(Reported(session="0" * 16, bundle=ref, state="refused", detail="no room"))
    wait_for(lambda: registry.device(TENANT, "hub").state == "refused")
    assert [row.detail for row in registry.events(TENANT)] == ["42 samples"]
    assert registry.device(TENANT, "hub").bundle is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_evidence_that_is_not_finite_is_refused(ready, rejected, make_report, wait_for, value):
    _, device = ready("hub")
    device.send(make_report(peak=value))
    wait_for(lambda: rejected() == {("hub", "report: malformed"): 1})


def test_an_emptied_retained_message_is_no_fault(ready, rejected, wait_for, registry):
    _, device = ready("hub")
    device.send_raw(Status, b"")
    device.send_raw(Status, b"?")
    wait_for(lambda: rejected() == {("hub", "status: malformed"): 1})


def test_only_registered_bundles_and_existing_chunks_are_served(ready, rejected, wait_for):
    ref, device = ready("hub")
    device.ask("f" * 64, 0)
    device.ask(ref.digest, 0, 3)
    device.ask(ref.digest, 2**50)
    device.send_raw(ChunkRequest, cbor2.dumps({"digest": ref.digest, "indices": list(range(65))}))
    wait_for(
        lambda: (
            rejected()
            == {
                ("hub", "blob/get: unknown digest"): 1,
                ("hub", "blob/get: index past the end"): 2,
                ("hub", "blob/get: malformed"): 1,
            }
        )
    )
    assert device.chunks == {}


def test_a_push_is_verified_first(server, registry, make_bundle, tmp_path):
    with pytest.raises(TrustError, match="unknown key"):
        server.push(make_bundle(by=Signer.generate()))
    damaged = tmp_path / "damaged.bundle"
    damaged.write_bytes(make_bundle().read_bytes()[:-100])
    with pytest.raises(BundleError, match="damaged"):
        server.push(damaged)
    assert registry.desired(TENANT) is None
    with pytest.raises(BundleError, match="edge-ll push"):
        server.current_bundle()


def test_a_server_serves_one_tenant(transport, registry, tmp_path, trust):
    with pytest.raises(ProtocolError, match="tenant"):
        FleetServer(transport, registry, tenant="+", folder=tmp_path, trust=trust)


def test_merging_needs_a_signer_and_trust(transport, registry, tmp_path, trust):
    server = FleetServer(transport, registry, tenant=TENANT, folder=tmp_path, trust=trust)
    with pytest.raises(TrustError, match="signing key"):
        server.merge_round([], lambda theta, classes: {}, timeout_s=1.0, max_forgetting=0.0)
    server = FleetServer(transport, registry, tenant=TENANT, folder=tmp_path, trust=None)
    with pytest.raises(TrustError, match="no trusted key"):
        server.push(tmp_path / "x.bundle")
