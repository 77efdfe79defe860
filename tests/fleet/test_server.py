"""The server over the in-memory broker, with scripted devices."""

import hashlib
import logging
import math

import cbor2
import msgspec
import numpy as np
import pytest

pytest.importorskip("sqlalchemy", reason="the fleet extra is not installed")

from edge_ll.bundle import Bundle
from edge_ll.errors import BundleError, ProtocolError, TrustError
from edge_ll.fleet.publishing import publish_bundle
from edge_ll.fleet.server import FleetServer
from edge_ll.messages import Birth, ChunkRequest, Event, Report, Status, UpdateOffer
from edge_ll.transport.memory import MemoryTransport
from edge_ll.trust import Signer

pytestmark = pytest.mark.fleet

TENANT = "home"


@pytest.fixture
def transport(broker):
    transport = MemoryTransport(broker, client_id="fleet")
    yield transport
    transport.close()


@pytest.fixture
def server(transport, registry, tmp_path, trust, signer):
    server = FleetServer(
        transport, registry, tenant=TENANT, folder=tmp_path / "data", trust=trust, signer=signer
    )
    server.start()
    transport.connect(1.0)
    yield server
    server.stop()
    assert transport.handler_errors == 0


@pytest.fixture
def rejected(registry):
    return lambda: {(row.device, row.reason): row.count for row in registry.rejected(TENANT)}


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


def test_evidence_of_nothing_is_minus_infinity_and_kept(ready, registry, make_report, wait_for):
    _, device = ready("hub")
    device.send(make_report(peak=-math.inf))
    wait_for(lambda: registry.reports(TENANT, "hub"))


def test_an_emptied_retained_message_is_no_fault(ready, rejected, wait_for, registry):
    _, device = ready("hub")
    device.send_raw(Status, b"")
    device.send_raw(Status, b"?")
    wait_for(lambda: rejected() == {("hub", "status: malformed"): 1})


def test_only_registered_bundles_and_existing_chunks_are_served(ready, rejected, wait_for):
    ref, device = ready("hub")
    device.ask("f" * 64, 0)
    device.ask(ref.digest, 0, 3)
    device.ask(ref.digest, 2**62)
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
    with pytest.raises(ProtocolError, match="one tenant"):
        FleetServer(transport, registry, tenant="+", folder=tmp_path, trust=trust)


# Rounds


def test_updates_are_pulled_checked_and_recorded(
    ready, server, registry, make_tail, rejected, tmp_path
):
    ref, one, two, _mute, refusing, absent = ready("one", "two", "mute", "refusing", "absent")
    one.theta = two.theta = make_tail(1, 1, 1, 0)  # the same bytes from two devices
    one.twice = True
    refusing.refuse = "too little learned"
    absent.transport.close()
    result = server.collect_updates(["one", "two", "mute", "refusing", "absent"], timeout_s=1.0)
    assert [(item.device, item.samples, item.classes) for item in result.updates] == [
        ("one", 10, (0, 1, 2, 3)),
        ("two", 10, (0, 1, 2, 3)),
    ]
    np.testing.assert_array_equal(result.updates[0].theta, one.theta.ravel())
    assert result.missing == {
        "mute": "no answer after 1 s",
        "refusing": "the device refused: too little learned",
        "absent": "no answer after 1 s",
    }
    for row in registry.updates(TENANT):
        assert row.base_digest == ref.digest
        assert hashlib.sha256((tmp_path / "data/updates" / row.file).read_bytes()).hexdigest() == (
            row.digest
        )
    assert [row.device for row in registry.updates(TENANT)] == ["one", "two"]
    assert rejected() == {}


@pytest.mark.parametrize(
    ("change", "reason", "counted"),
    [
        ({"size_bytes": 10**9}, "expected a tail of 64 bytes, got 1000000000", "wrong size"),
        ({"size_bytes": 60}, "expected a tail of 64 bytes, got 60", "wrong size"),
        ({"base": "f" * 64}, "learned on bundle ffffffffffff", "wrong base"),
        ({"samples": 0}, "no sample", "no samples"),
        ({"classes": (0, 4)}, "expected classes 0 to 3, got up to 4", "wrong classes"),
        ({"command": "0" * 16}, "no answer", "not asked for"),
    ],
)
def test_an_offer_that_does_not_fit_is_refused_before_any_chunk(
    ready, server, make_tail, rejected, wait_for, change, reason, counted
):
    _, device = ready("hub")
    device.theta = make_tail(1, 1, 1, 1)
    device.offer_with = change
    result = server.collect_updates(["hub"], timeout_s=0.5)
    assert result.updates == ()
    assert reason in result.missing["hub"]
    assert device.update_requests == []
    wait_for(lambda: rejected() == {("hub", f"up/offer: {counted}"): 1})


def test_chunks_that_got_lost_are_asked_for_again(ready, server, make_tail):
    _, device = ready("hub")
    device.theta = make_tail(1, 1, 1, 1)
    device.deaf_once = True
    result = server.collect_updates(["hub"], timeout_s=10.0)
    assert len(result.updates) == 1
    assert len(device.update_requests) == 2


def test_a_second_offer_in_a_round_is_refused(ready, server, make_tail, rejected, wait_for):
    _, device = ready("hub")
    device.theta = make_tail(1, 1, 1, 1)
    assert len(server.collect_updates(["hub"], timeout_s=5.0).updates) == 1
    late = device.last_offer
    device.send(late)  # delivered twice: no fault
    device.send(msgspec.structs.replace(late, samples=10**6))
    wait_for(lambda: rejected() == {("hub", "up/offer: too late"): 1})


def test_an_update_with_another_hash_or_nan_is_refused(ready, server, make_tail):
    _, lying, nan = ready("lying", "nan")
    lying.theta = make_tail(1, 1, 1, 1)
    lying.offer_with = {"digest": "f" * 64}
    nan.theta = make_tail(math.nan, 1, 1, 1)
    result = server.collect_updates(["lying", "nan"], timeout_s=5.0)
    assert "expected a file with sha256 ffff" in result.missing["lying"]
    assert "not finite" in result.missing["nan"]


def test_an_offer_after_the_round_or_without_one_is_counted(
    ready, server, make_tail, rejected, wait_for
):
    ref, device = ready("hub")
    offer = UpdateOffer(
        command="0" * 16, base=ref.digest, digest="f" * 64, size_bytes=64, samples=1, classes=(0,)
    )
    device.send(offer)
    wait_for(lambda: rejected() == {("hub", "up/offer: not asked for"): 1})


def test_wrong_names_are_left_out(ready, server):
    ready("hub")
    result = server.collect_updates(["../hub", "+"], timeout_s=0.2)
    assert set(result.missing) == {"../hub", "+"}


def test_collecting_offline_fails_at_once(ready, server, transport):
    ready("hub")
    transport.drop()
    result = server.collect_updates(["hub"], timeout_s=30.0)
    assert "could not be sent" in result.missing["hub"]


# Merging


@pytest.fixture
def evaluate(server, engine):
    """Ten one-hot samples of each class, so accuracies are shares of classes told apart."""

    def make():
        from edge_ll.fleet.evaluation import holdout_evaluator

        x = np.tile(np.eye(4, dtype=np.float32), (10, 1))
        labels = np.tile(np.arange(4), 10)
        return holdout_evaluator(engine, server.current_bundle(), x, labels)

    return make


def test_what_devices_learned_is_merged_signed_and_offered(
    ready, server, registry, make_tail, evaluate, wait_for, engine, make_report
):
    base, one, two, drifting = ready("one", "two", "drifting")
    one.theta, one.classes, one.samples = make_tail(1, 1, 1, 0), (0, 1, 2), 30
    two.theta, two.classes, two.samples = make_tail(1, 1, 0, 1), (0, 1, 3), 10
    drifting.theta = make_tail(9, 9, 9, 9)
    drifting.send(make_report(digest=base.digest, peak=7.0))
    wait_for(lambda: registry.alarms(TENANT))
    result = server.merge_round(
        ["one", "two", "drifting"], evaluate(), timeout_s=5.0, max_forgetting=0.05
    )
    assert (result.accepted, result.reasons) == (True, ())
    assert (result.base_acc, result.merged_acc, result.best_single_acc) == (0.5, 1.0, 0.75)
    assert result.single_accs == {"one": 0.75, "two": 0.75}
    assert result.left_out == {"drifting": "under drift alarm"}
    assert engine.calls == 1
    wait_for(lambda: one.offers[-1].bundle == result.bundle)
    bundle = server.current_bundle()
    assert (bundle.digest, bundle.manifest.version) == (result.bundle.digest, 2)
    assert bundle.manifest.known_classes == (0, 1, 2, 3)
    np.testing.assert_allclose(np.diag(bundle.theta().reshape(4, 4)), [1, 1, 0.75, 0.25])
    origin = bundle.manifest.provenance
    assert (origin.parent, origin.merged_from) == (base.digest, ("one", "two"))
    assert origin.metrics == {
        "teacher_acc": 0.9,
        "holdout_base_acc": 0.5,
        "holdout_best_single_acc": 0.75,
        "holdout_merged_acc": 1.0,
        "holdout_acc_old": 1.0,
        "holdout_acc_new": 1.0,
    }
    assert registry.bundle(bundle.digest).parent == base.digest


def test_a_merge_that_forgets_is_refused_and_nothing_is_published(
    ready, server, registry, make_tail, evaluate, tmp_path
):
    base, one = ready("one")
    one.theta = make_tail(-1, 1, 1, 1)
    result = server.merge_round(["one"], evaluate(), timeout_s=5.0, max_forgetting=0.05)
    assert not result.accepted
    assert result.bundle is None
    assert "group 'old' falls from 100.0 % (20 of 20) to 50.0 % (10 of 20)" in result.reasons[0]
    assert result.merged_acc == 0.75
    assert registry.desired(TENANT).digest == base.digest
    assert [row.digest for row in registry.bundles()] == [base.digest]
    assert [path.name for path in (tmp_path / "data/bundles").iterdir()] == [
        f"{base.digest}.bundle"
    ]
    assert len(one.offers) == 1


def test_an_outlier_is_left_out_of_the_merge(ready, server, make_tail, evaluate):
    _, *devices = ready("a", "b", "c", "far")
    for device in devices:
        device.theta = make_tail(1, 1, 1, 1)
    devices[-1].theta = make_tail(1, 1, -50, -50)
    result = server.merge_round(
        ["a", "b", "c", "far"], evaluate(), timeout_s=5.0, max_forgetting=0.05
    )
    assert result.accepted
    assert list(result.left_out) == ["far"]
    assert "times the median" in result.left_out["far"]


def test_a_round_without_updates_changes_nothing(ready, server, registry, evaluate):
    base, _ = ready("mute")
    result = server.merge_round(["mute"], evaluate(), timeout_s=0.2, max_forgetting=0.05)
    assert not result.accepted
    assert (result.merged_acc, result.best_single_acc, result.base_acc) == (None, None, 0.5)
    assert registry.desired(TENANT).digest == base.digest


def test_a_push_during_the_round_wins(
    ready, server, registry, make_tail, evaluate, make_bundle, tmp_path, trust
):
    _, one = ready("one")
    one.theta = make_tail(1, 1, 1, 1)
    inner, pushed = evaluate(), []

    def pushing(theta, classes):
        if not pushed:
            path = make_bundle(version=7)
            pushed.append(
                publish_bundle(registry, tmp_path / "data", path, trust=trust, tenant=TENANT)
            )
        return inner(theta, classes)

    result = server.merge_round(["one"], pushing, timeout_s=5.0, max_forgetting=0.05)
    assert not result.accepted
    assert "another bundle became the desired one" in result.reasons[0]
    assert registry.desired(TENANT).digest == pushed[0].digest


def test_merging_needs_a_signer_and_trust(transport, registry, tmp_path, trust):
    server = FleetServer(transport, registry, tenant=TENANT, folder=tmp_path, trust=trust)
    with pytest.raises(TrustError, match="signing key"):
        server.merge_round([], lambda theta, classes: {}, timeout_s=1.0, max_forgetting=0.0)
    server = FleetServer(transport, registry, tenant=TENANT, folder=tmp_path, trust=None)
    with pytest.raises(TrustError, match="no trusted key"):
        server.push(tmp_path / "x.bundle")
