"""Rounds over the in-memory broker: tails are collected, merged, gated and published."""

import hashlib
import math
import threading

import msgspec
import numpy as np
import pytest

pytest.importorskip("sqlalchemy", reason="the fleet extra is not installed")

from edge_ll.engine.port import EngineInfo, EngineState, check_theta
from edge_ll.fleet.evaluation import holdout_evaluator
from edge_ll.fleet.publishing import publish_bundle
from edge_ll.messages import UpdateOffer

pytestmark = pytest.mark.fleet

TENANT = "home"
CLASSES, LATENT = 4, 4


class LinearEngine:
    """A numpy engine: the latent is the input, the tail one matrix."""

    def __init__(self):
        self.calls = 0
        self._theta = np.zeros(LATENT * CLASSES, np.float32)

    @property
    def info(self):
        return EngineInfo("fake", "CPU", "numpy")

    @property
    def theta(self):
        return self._theta.copy()

    def set_theta(self, theta):
        self._theta = check_theta(theta, LATENT * CLASSES)

    def latents(self, x):
        self.calls += 1
        return x.astype(np.float32)

    def logits(self, latents):
        return latents @ self._theta.reshape(LATENT, CLASSES)

    def step(self, batch):
        raise NotImplementedError

    def state(self):
        return EngineState(self.theta, b"")

    def restore(self, state):
        self._theta = state.theta.copy()


@pytest.fixture
def engine():
    return LinearEngine()


def test_updates_are_pulled_checked_and_recorded(
    ready, server, registry, make_tail, rejected, tmp_path
):
    ref, one, two, _mute, refusing, absent = ready("one", "two", "mute", "refusing", "absent")
    one.theta = two.theta = make_tail(1, 1, 1, 0)  # the same bytes from two devices
    one.twice = True
    refusing.refuse = "too little learned"
    absent.transport.close()
    result = server.collect_updates(["one", "two", "mute", "refusing", "absent"], timeout_s=2.0)
    assert [(item.device, item.samples, item.classes) for item in result.updates] == [
        ("one", 10, (0, 1, 2, 3)),
        ("two", 10, (0, 1, 2, 3)),
    ]
    np.testing.assert_array_equal(result.updates[0].theta, one.theta.ravel())
    assert result.missing == {
        "mute": "no answer after 2 s",
        "refusing": "the device refused: too little learned",
        "absent": "no answer after 2 s",
    }
    for row in registry.updates(TENANT):
        assert row.base_digest == ref.digest
        assert hashlib.sha256((tmp_path / "data/updates" / row.file).read_bytes()).hexdigest() == (
            row.digest
        )
    assert {row.device for row in registry.updates(TENANT)} == {"one", "two"}
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


def test_collecting_offline_gives_no_answer(ready, server, transport):
    ready("hub")
    transport.drop()
    result = server.collect_updates(["hub"], timeout_s=0.3)
    assert "no answer" in result.missing["hub"]


def test_a_lost_command_is_sent_again(ready, server, transport, make_tail):
    _, device = ready("hub")
    device.theta = make_tail(1, 1, 1, 1)
    transport.drop()
    back = threading.Timer(0.3, transport.restore)
    back.start()
    result = server.collect_updates(["hub"], timeout_s=20.0)
    back.join()
    assert [update.device for update in result.updates] == ["hub"]


@pytest.fixture
def evaluate(server, engine):
    """Ten one-hot samples of each class, so accuracies are shares of classes told apart."""

    def make():
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
