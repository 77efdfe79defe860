"""Which bundle runs: an offer is pulled, verified and only then switched to."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from edge_ll.bundle import BACKBONE, STEP, TAIL, Bundle
from edge_ll.errors import EngineError
from edge_ll.messages import CHUNK_BYTES, Address, BundleRef, Chunk, ChunkRequest, Offer
from edge_ll.trust import Signer
from edge_ll_device.config import AgentConfig, BrokerConfig, LearningConfig, RuntimeConfig
from edge_ll_device.deployment import Deployment
from edge_ll_device.outbox import Outbox
from edge_ll_device.reporter import Reporter
from edge_ll_device.source import Sample
from edge_ll_device.store import Store
from tests.tiny_bundle import (
    BASE,
    SIGNER,
    TRUST,
    Graph,
    tail_graph,
    toy,
    write_tiny_bundle,
)

BALLAST = {"ballast.bin": np.random.default_rng(0).bytes(5 * CHUNK_BYTES)}


def _config(folder: Path, **changes) -> AgentConfig:
    return AgentConfig(
        **{
            "device": "hub",
            "state_dir": str(folder),
            "trusted_keys": (SIGNER.public_key.hex(),),
            "broker": BrokerConfig(url="mqtt://127.0.0.1"),
            **changes,
        }
    )


class Recorder(Reporter):
    """Keeps what became of each offer."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__(outbox, session="0" * 16, clock=lambda: 0.0)
        self.states: list[tuple[int, str, str]] = []

    def state(self, bundle, state, detail=""):
        self.states.append((bundle.version, state, detail))
        super().state(bundle, state, detail)


class Rig:
    """A deployment with everything around it in reach."""

    def __init__(self, folder: Path, **changes) -> None:
        self.folder = folder
        self.store = Store(folder, TRUST)
        self.outbox = Outbox(self.store.outbox, Address("default", "hub"))
        self.reporter = Recorder(self.outbox)
        self.asked: list[ChunkRequest] = []
        self.activations: list[bool] = []
        self.deployment = Deployment(
            _config(folder, **changes),
            self.store,
            self.reporter,
            send=self.asked.append,
            activated=self.activations.append,
        )

    @property
    def states(self) -> list[str]:
        return [state for _, state, _ in self.reporter.states]

    @property
    def runs(self) -> int | None:
        student = self.deployment.student
        return student.ref.version if student else None

    def offer(self, data: bytes, **changes) -> Offer:
        digest = hashlib.sha256(data).hexdigest()
        ref = {"name": "toy", "version": 1, "digest": digest}
        return Offer(bundle=BundleRef(**(ref | changes)), size_bytes=len(data))

    def deliver(self, data: bytes, **changes) -> None:
        """Offer, then feed every chunk that is asked for."""
        offer = self.offer(data, **changes)
        self.deployment.consider(offer)
        self.deployment.turn()
        served = 0
        while served < len(self.asked):
            request = self.asked[served]
            served += 1
            for index in request.indices:
                part = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
                self.deployment.accept(Chunk(digest=request.digest, index=index, data=part))
        self.deployment.turn()
        self.asked.clear()


@pytest.fixture
def rig(tmp_path):
    made = Rig(tmp_path / "state")
    yield made
    made.outbox.close()


def _bundle(tmp_path: Path, version: int = 1, **changes) -> bytes:
    path = tmp_path / f"v{version}.bundle"
    write_tiny_bundle(path, version=version, **changes)
    return path.read_bytes()


def _learn(rig: Rig, classes=(2,), n=16) -> None:
    x, y = toy(classes, n)
    rig.deployment.student.take([Sample(a, int(b), 1) for a, b in zip(x, y, strict=True)])


def test_an_offer_is_pulled_verified_and_runs(rig, tmp_path):
    data = _bundle(tmp_path, files=BALLAST)
    rig.deliver(data)
    assert rig.states == ["pulling", "active"]
    assert rig.activations == [True]
    assert rig.runs == 1
    assert rig.store.current() == hashlib.sha256(data).hexdigest()
    assert rig.store.bundle_path(rig.store.current()).read_bytes() == data
    assert list(rig.store.incoming.iterdir()) == []
    assert rig.deployment.waits_for is None


def test_progress_is_shown_and_a_window_is_asked_for(rig, tmp_path):
    data = _bundle(tmp_path, files=BALLAST)
    rig.deployment.consider(rig.offer(data))
    assert rig.deployment.waits_for == "toy 1: 0/6"
    rig.deployment.turn()
    rig.deployment.turn()
    assert [request.indices for request in rig.asked] == [tuple(range(6))]
    rig.deployment.accept(
        Chunk(digest=rig.asked[0].digest, index=2, data=data[2 * CHUNK_BYTES : 3 * CHUNK_BYTES])
    )
    assert rig.deployment.waits_for == "toy 1: 1/6"


def test_chunks_that_do_not_fit_are_ignored(rig, tmp_path):
    data = _bundle(tmp_path, files=BALLAST)
    part = data[:CHUNK_BYTES]
    digest = hashlib.sha256(data).hexdigest()
    rig.deployment.accept(Chunk(digest=digest, index=0, data=part))  # nothing is pulled yet
    rig.deployment.consider(rig.offer(data))
    for chunk in (
        Chunk(digest="f" * 64, index=0, data=part),
        Chunk(digest=digest, index=6, data=part),
        Chunk(digest=digest, index=2**62, data=part),
        Chunk(digest=digest, index=0, data=part[:-1]),
        Chunk(digest=digest, index=0, data=b""),
        Chunk(digest=digest, index=5, data=part),
    ):
        rig.deployment.accept(chunk)
    assert rig.deployment.waits_for == "toy 1: 0/6"
    for _ in range(3):
        rig.deployment.accept(Chunk(digest=digest, index=0, data=part))
    assert rig.deployment.waits_for == "toy 1: 1/6"


def test_the_same_offer_again_changes_nothing(rig, tmp_path):
    data = _bundle(tmp_path)
    rig.deployment.consider(rig.offer(data))
    rig.deployment.consider(rig.offer(data))
    assert rig.states == ["pulling"]
    rig.deliver(data)
    rig.deployment.consider(rig.offer(data))
    assert rig.states == ["pulling", "active", "active"]
    assert rig.deployment.waits_for is None


def test_a_newer_offer_replaces_the_pull_under_way_and_its_remains(rig, tmp_path):
    first, second = _bundle(tmp_path, files=BALLAST), _bundle(tmp_path, 2)
    rig.deployment.consider(rig.offer(first))
    rig.deployment.turn()
    digest = hashlib.sha256(first).hexdigest()
    rig.deployment.accept(Chunk(digest=digest, index=0, data=first[:CHUNK_BYTES]))
    rig.asked.clear()
    rig.deliver(second, version=2)
    assert rig.runs == 2
    assert list(rig.store.incoming.iterdir()) == [], "disks here are small"


def test_an_offer_of_what_runs_withdraws_the_pull_under_way(rig, tmp_path):
    """The fleet takes a rollout back by offering the old bundle again."""
    first, second = _bundle(tmp_path), _bundle(tmp_path, 2, files=BALLAST)
    rig.deliver(first)
    rig.deployment.consider(rig.offer(second, version=2))
    rig.deployment.turn()
    rig.deployment.consider(rig.offer(first))
    assert rig.deployment.waits_for is None
    digest = hashlib.sha256(second).hexdigest()
    for index in range(6):
        part = second[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        rig.deployment.accept(Chunk(digest=digest, index=index, data=part))
    rig.deployment.turn()
    assert rig.runs == 1


def _unknown_operator() -> bytes:
    g = Graph()
    g.op("NoSuchOperator", "x", out="y")
    return g.model({"x": ("float32", (1,))}, {"y": ("float32", (1,))})


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


# Name -> (bundle's fields, what is done to its bytes, the offer's fields, part of the reason)
REFUSED = {
    "older": ({"version": 1}, None, {"version": 1}, "version 2 runs; offered 1"),
    "same version": ({"version": 2, "metrics": 1}, None, {"version": 2}, "version 2 runs"),
    "a stranger's": ({"signer": Signer.generate()}, None, {}, "unknown key"),
    "another name": ({}, None, {"name": "other"}, "offered other 3, the bundle is toy 3"),
    "another version": ({"version": 4}, None, {"version": 3}, "offered toy 3, the bundle is toy 4"),
    "wrong hash": ({}, None, {"digest": "e" * 64}, "sha256"),
    "cut off": ({}, _cut, {}, "damaged or cut off"),
    "no bundle": ({}, lambda _: b"hello " * 100, {}, "damaged or cut off"),
    "no engine": ({"engines": ("ort-training",)}, None, {}, "holds no engine 'step-graph'"),
    "bad backbone": ({"files": {BACKBONE: _unknown_operator()}}, None, {}, "refuses it"),
    "bad step": ({"files": {STEP: _unknown_operator()}}, None, {}, "refuses it"),
    "a tail of other inputs": ({"files": {TAIL: tail_graph(latents="z")}}, None, {}, ""),
    "a label past the capacity": (
        {"arrays": {"exemplar_labels": np.full(40, 9)}}, None, {}, ""
    ),
    "anchors of another shape": (
        {"arrays": {"anchor_latents": np.zeros((120, 5), np.int8)}}, None, {}, ""
    ),
    "fewer anchor labels": ({"arrays": {"anchor_labels": np.zeros(3, np.int64)}}, None, {}, ""),
    "novelty of another width": (
        {"arrays": {"novelty_center": np.zeros(5, np.float32)}}, None, {}, ""
    ),
    "theta that is not finite": ({"theta": np.full(28, np.nan, "f4")}, None, {}, "finite"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "spoil", "said", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_bad_bundle_is_refused_and_the_old_one_goes_on(
    rig, tmp_path, monkeypatch, fields, spoil, said, reason
):
    old = _bundle(tmp_path, 2)
    rig.deliver(old, version=2)
    _learn(rig)
    before = rig.deployment.student
    theta = before.learner.engine.theta
    rig.reporter.states.clear()

    fields = {"version": 3, **fields}
    if fields.pop("metrics", None):  # other bytes, the same version
        fields["files"] = {"note": b"other"}
    with monkeypatch.context() as patch:  # the builder need not be able to open what it wrote
        patch.setattr(Bundle, "open", lambda *_: None)
        data = _bundle(tmp_path, **fields)
    data = spoil(data) if spoil else data
    rig.deliver(data, **{"version": 3, **said})

    assert rig.states[-1] == "refused"
    assert reason in rig.reporter.states[-1][2]
    assert rig.runs == 2
    assert rig.deployment.student is before
    assert np.array_equal(rig.deployment.student.learner.engine.theta, theta)
    assert rig.deployment.waits_for is None
    digest = hashlib.sha256(old).hexdigest()
    assert rig.store.current() == digest
    assert [path.stem for path in (rig.folder / "bundles").iterdir()] == [digest]
    _learn(rig)
    rig.deployment.save()
    again = Rig(rig.folder)
    again.deployment.resume()
    assert again.runs == 2
    again.outbox.close()


def test_a_refusal_is_also_an_event(rig, tmp_path):
    rig.deliver(b"hello " * 100)
    rows = rig.outbox._db.execute("SELECT topic, payload FROM outbox").fetchall()
    events = [payload for topic, payload in rows if topic.endswith("/event")]
    assert len(events) == 1
    assert b"bundle_refused" in events[0]


def test_a_failure_after_the_switch_is_no_reason_to_delete_what_runs(rig, tmp_path):
    """Whoever is told of a switch may fail (a missing stream file, say); the bundle is good."""

    def fail(first):
        raise EngineError("the listener failed")

    rig.deployment._activated = fail
    with contextlib.suppress(EngineError):
        rig.deliver(_bundle(tmp_path))
    assert rig.states == ["pulling", "active"]
    assert rig.store.bundle_path(rig.store.current()).exists()


def test_a_disk_that_fails_while_chunks_arrive_does_not_stop_the_agent(rig, tmp_path, monkeypatch):
    data = _bundle(tmp_path)
    rig.deployment.consider(rig.offer(data))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        rig.deployment.accept(
            Chunk(digest=hashlib.sha256(data).hexdigest(), index=0, data=data[:CHUNK_BYTES])
        )
    rig.deliver(data)
    assert rig.runs == 1


def test_the_second_bundle_takes_over_what_the_first_remembers(rig, tmp_path):
    rig.deliver(_bundle(tmp_path))
    _learn(rig)
    tally = rig.deployment.student.tally
    rig.deliver(_bundle(tmp_path, 2), version=2)
    assert rig.activations == [True, False]
    assert "kept 56 replay entries" in rig.reporter.states[-1][2]
    student = rig.deployment.student
    assert student.tally == replace(tally, learned_here=0)
    assert student.learner.known_classes == (*BASE, 2)
    assert len(list((rig.folder / "bundles").iterdir())) == 1


def test_a_bundle_of_another_name_may_replace_it(rig, tmp_path):
    rig.deliver(_bundle(tmp_path, 5), version=5)
    path = tmp_path / "other"
    write_tiny_bundle(path, name="other", version=1)
    rig.deliver(path.read_bytes(), name="other", version=1)
    assert rig.deployment.student.ref.name == "other"


def test_restart_brings_back_what_was_learned(rig, tmp_path):
    rig.deliver(_bundle(tmp_path))
    _learn(rig)
    rig.deployment.save()
    before = rig.deployment.student
    again = Rig(rig.folder)
    again.deployment.resume()
    after = again.deployment.student
    assert after.tally == before.tally
    assert after.learner.known_classes == before.learner.known_classes
    assert np.array_equal(after.learner.engine.theta, before.learner.engine.theta)
    assert after.learner.engine.state().optimizer == before.learner.engine.state().optimizer
    assert again.activations == []
    again.outbox.close()


def test_nothing_to_resume_and_nothing_to_save(rig):
    rig.deployment.resume()
    rig.deployment.save()
    rig.deployment.turn()
    assert rig.runs is None


@pytest.mark.parametrize("damage", ["bundle missing", "bundle cut", "current garbled"])
def test_without_a_good_bundle_it_waits_for_an_offer(rig, tmp_path, damage):
    data = _bundle(tmp_path)
    rig.deliver(data)
    path = rig.store.bundle_path(rig.store.current())
    match damage:
        case "bundle missing":
            path.unlink()
        case "bundle cut":
            path.write_bytes(data[:-100])
        case "current garbled":
            (rig.folder / "current").write_bytes(b"\xff\xfe\x00")
    again = Rig(rig.folder)
    again.deployment.resume()
    assert again.runs is None
    again.deliver(data)
    assert again.runs == 1
    again.outbox.close()


def test_damaged_learning_does_not_stop_a_good_bundle_from_running(rig, tmp_path):
    rig.deliver(_bundle(tmp_path))
    digest = rig.store.current()
    (rig.folder / "learned" / f"{digest}.npz").write_bytes(b"damaged")
    again = Rig(rig.folder)
    again.deployment.resume()
    assert again.runs == 1
    assert (rig.folder / "learned" / f"{digest}.damaged").exists()
    again.outbox.close()


def test_learning_of_another_buffer_size_is_resumed(rig, tmp_path):
    rig.deliver(_bundle(tmp_path))
    _learn(rig)
    rig.deployment.save()
    again = Rig(rig.folder, learning=LearningConfig(buffer_entries=10))
    again.deployment.resume()
    student = again.deployment.student
    assert len(student.learner.buffer) == 10
    assert min(student.learner.buffer.class_counts[:3]) >= 3
    again.outbox.close()


def test_the_runtime_s_settings_reach_the_engine(tmp_path):
    rig = Rig(tmp_path / "state", runtime=RuntimeConfig(engine="ort-training"))
    rig.deliver(_bundle(tmp_path))
    assert rig.states[-1] == "refused"
    assert "holds no engine 'ort-training'" in rig.reporter.states[-1][2]
    rig.outbox.close()


def test_an_interrupted_pull_goes_on_after_a_restart(rig, tmp_path):
    data = _bundle(tmp_path, files=BALLAST)
    rig.deployment.consider(rig.offer(data))
    rig.deployment.turn()
    for index in (0, 3):
        part = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        digest = hashlib.sha256(data).hexdigest()
        rig.deployment.accept(Chunk(digest=digest, index=index, data=part))
    again = Rig(rig.folder)
    again.deployment.consider(again.offer(data))
    again.deployment.turn()
    assert again.asked[0].indices == (1, 2, 4, 5)
    again.deliver(data)
    assert again.runs == 1
    again.outbox.close()
