"""The agent on its own thread, with a fleet that follows a script."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from edge_ll.errors import DataError, TransportError
from edge_ll.messages import (
    CHUNK_BYTES,
    FROM_DEVICE,
    Address,
    Birth,
    BundleRef,
    Chunk,
    ChunkRequest,
    Command,
    CommandResult,
    Event,
    Offer,
    Report,
    Reported,
    Status,
    UpdateChunk,
    UpdateOffer,
    UpdateRequest,
)
from edge_ll.transfer import Puller
from edge_ll.transport.memory import MemoryBroker, MemoryTransport
from edge_ll.trust import Signer
from edge_ll_device import agent as agent_module
from edge_ll_device import deployment
from edge_ll_device.agent import Agent, last_will
from edge_ll_device.config import AgentConfig, BrokerConfig, StreamConfig
from edge_ll_device.store import Store, read_status
from tests.conftest import wait_until
from tests.tiny_bundle import (
    BASE,
    CAPACITY,
    LATENT,
    SIGNER,
    TRUST,
    toy,
    write_stream,
    write_tiny_bundle,
)

HERE = Address("home", "hub")
SESSION = "0123456789abcdef"
BALLAST = {"ballast.bin": np.random.default_rng(0).bytes(20 * CHUNK_BYTES)}


class Fleet:
    """Remembers what a device says, and serves the chunks of what it offered."""

    hub: Running  # the agent that runs now: when it dies nobody waits any longer

    def __init__(self, broker: MemoryBroker) -> None:
        self.heard: list = []
        self.served: list[int] = []
        self.serve = 10**9  # so many chunks, then silence
        self.spoil = False
        self._files: dict[str, bytes] = {}
        self._transport = MemoryTransport(broker, client_id="fleet")
        for kind in FROM_DEVICE:
            self._transport.subscribe(kind.topic(HERE), partial(self._hear, kind))
        self._transport.connect(1)

    def _hear(self, kind, received) -> None:
        message = kind.decode(received.payload)
        self.heard.append(message)
        if isinstance(message, ChunkRequest) and not isinstance(message, UpdateRequest):
            for index in message.indices:
                if len(self.served) < self.serve:
                    self.served.append(index)
                    self.send(self._chunk(message.digest, index))

    def _chunk(self, digest: str, index: int) -> Chunk:
        data = self._files[digest][index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
        if self.spoil:
            data = bytes([data[0] ^ 1]) + data[1:]
        return Chunk(digest=digest, index=index, data=data)

    def send(self, message) -> None:
        self._transport.publish(message.topic(HERE), message.encode(), retain=message.retain)

    def say(self, kind, payload: bytes) -> None:
        self._transport.publish(kind.topic(HERE), payload)

    def offer(self, data: bytes, *, name: str = "toy", version: int = 1) -> BundleRef:
        digest = hashlib.sha256(data).hexdigest()
        self._files[digest] = data
        ref = BundleRef(name=name, version=version, digest=digest)
        self.send(Offer(bundle=ref, size_bytes=len(data)))
        return ref

    def of(self, kind) -> list:
        return [message for message in self.heard if type(message) is kind]

    def reports(self) -> list[Report]:
        """Each once, in their order: a lost connection may bring one twice."""
        return list({(report.session, report.seq): report for report in self.of(Report)}.values())

    def states(self) -> list[str]:
        return [message.state for message in self.of(Reported)]

    def wait_for(self, condition) -> None:
        assert wait_until(lambda: condition(self) or self.hub.died)
        assert not self.hub.died

    def wait_for_end(self) -> Report:
        """The report of the last experience."""
        self.wait_for(lambda fleet: any(e.kind == "stream_ended" for e in fleet.of(Event)))
        return self.of(Report)[-1]

    def close(self) -> None:
        self._transport.close()


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


@pytest.fixture
def fleet(broker):
    made = Fleet(broker)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(deployment, "Puller", partial(Puller, stall_s=0.1))
    monkeypatch.setattr(agent_module, "_IDLE_S", 0.002)


def _config(folder: Path, stream: Path | None = None, *, interval_s: float = 0.0) -> AgentConfig:
    return AgentConfig(
        device="hub",
        tenant="home",
        state_dir=str(folder),
        trusted_keys=(SIGNER.public_key.hex(),),
        broker=BrokerConfig(url="mqtt://127.0.0.1"),
        stream=StreamConfig(file=str(stream), interval_s=interval_s) if stream else None,
    )


class Running:
    """An agent at work on a thread of its own, its transport, and what it died of."""

    def __init__(self, config: AgentConfig, transport: MemoryTransport, session: str) -> None:
        self.transport = transport
        self.agent: Agent | None = None
        self.died: list[BaseException] = []
        self._config = config
        self._session = session
        self._ready = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self._ready.wait(5)

    def _run(self) -> None:
        try:
            self.agent = Agent(
                self._config,
                self.transport,
                Store(self._config.state_path, TRUST),
                session=self._session,
                clock=lambda: 5.0,
            )
            self._ready.set()
            self.agent.run()
        except BaseException as error:  # noqa: BLE001 - raised again by the test
            self.died.append(error)
            self._ready.set()

    @property
    def deployment(self) -> deployment.Deployment:
        return self.agent._deployment


@contextlib.contextmanager
def _running(broker, config: AgentConfig, *, session: str = SESSION, kind=MemoryTransport):
    transport = kind(broker, client_id="home-hub", will=last_will(config, session))
    running = Running(config, transport, session)
    Fleet.hub = running
    try:
        yield running
    finally:
        if running.agent is not None:
            running.agent.stop()
        running.thread.join(10)
        transport.close()
        if running.died:
            raise running.died[0]
    assert not running.thread.is_alive()


def _bundle(tmp_path: Path, version: int = 1, **fields) -> bytes:
    path = tmp_path / f"v{version}.bundle"
    write_tiny_bundle(path, version=version, **fields)
    return path.read_bytes()


def _stream(tmp_path: Path, n: int = 60) -> Path:
    return write_stream(tmp_path / "stream.npz", toy((2,), n, seed=8), toy((3,), n, seed=9))


def test_from_birth_to_upload(broker, fleet, tmp_path):
    config = _config(tmp_path / "state", _stream(tmp_path))
    with _running(broker, config) as hub:
        fleet.wait_for(lambda f: f.of(Birth))
        birth = fleet.of(Birth)[0]
        assert (birth.engine, birth.bundle, birth.session) == ("none", None, SESSION)
        assert fleet.of(Status) == [Status(online=True, session=SESSION)]

        ref = fleet.offer(_bundle(tmp_path, files=BALLAST))
        end = fleet.wait_for_end()
        assert fleet.states() == ["pulling", "active"]
        assert sorted(fleet.served) == list(range(21))
        assert fleet.of(Birth)[-1].bundle == ref
        assert fleet.of(Birth)[-1].engine == "step-graph"

        reports = fleet.of(Report)
        assert reports[0].phase == "baseline"
        assert (reports[0].seen, reports[0].experience) == (0, 0)
        assert [r.seq for r in reports] == list(range(len(reports)))
        assert {r.at_s for r in reports} == {5.0}
        assert {r.bundle for r in reports} == {ref}
        ends = [(r.experience, r.seen) for r in reports if r.phase == "experience"]
        assert ends == [(1, 60), (2, 120)]
        progress = [r.seen for r in reports if r.phase == "progress"]
        assert [seen // 20 for seen in progress] == [1, 2, 4, 5]
        assert (end.seen, end.learned, end.refused) == (120, 120, 0)
        assert end.prequential.n == 120
        assert reports[0].anchors["base"].accuracy > 0.95
        assert reports[0].anchors["experience-1"].correct == 0
        assert min(c.accuracy for c in end.anchors.values()) > 0.85
        assert set(end.evidence) == {"novelty"}

        command = Command(id="f" * 16, verb="upload")
        fleet.send(command)
        fleet.wait_for(lambda f: f.of(CommandResult))
        assert fleet.of(CommandResult) == [CommandResult(id=command.id, ok=True)]
        update = fleet.of(UpdateOffer)[0]
        assert update.command == command.id
        assert update.base == ref.digest
        assert update.samples == 120
        assert update.classes == (0, 1, 2, 3)
        fleet.send(UpdateRequest(digest=update.digest, indices=(0, 1, 7)))
        fleet.send(UpdateRequest(digest="0" * 64, indices=(0,)))
        fleet.wait_for(lambda f: f.of(UpdateChunk))
        chunks = fleet.of(UpdateChunk)
        assert [chunk.index for chunk in chunks] == [0]
        assert hashlib.sha256(chunks[0].data).hexdigest() == update.digest
        assert len(chunks[0].data) == update.size_bytes == 4 * CAPACITY * (LATENT + 1)
        theta = hub.deployment.student.learner.engine.theta
        assert np.array_equal(np.frombuffer(chunks[0].data, "<f4"), theta)
    assert fleet.of(Status)[-1] == Status(online=False, session=SESSION)


def test_a_command_without_a_bundle_is_answered(broker, fleet, tmp_path):
    with _running(broker, _config(tmp_path / "state")):
        fleet.wait_for(lambda f: f.of(Birth))
        fleet.send(Command(id="f" * 16, verb="upload"))
        fleet.wait_for(lambda f: f.of(CommandResult))
    assert not fleet.of(CommandResult)[0].ok
    assert not fleet.of(UpdateOffer)


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


# Name -> (the bundle's fields, what is done to its bytes, the offer's fields, spoil the chunks)
REFUSED = {
    "wrong hash": ({}, None, {}, True),
    "a stranger's": ({"signer": Signer.generate()}, None, {}, False),
    "older": ({"version": 1}, None, {"version": 1}, False),
    "another name": ({}, None, {"name": "other"}, False),
    "cut off": ({}, _cut, {}, False),
}


@pytest.mark.parametrize(("fields", "spoil", "said", "wrong"), REFUSED.values(), ids=REFUSED)
def test_a_bad_bundle_is_refused_while_the_old_one_works_on(
    broker, fleet, tmp_path, fields, spoil, said, wrong
):
    config = _config(tmp_path / "state", _stream(tmp_path, 200), interval_s=0.005)
    with _running(broker, config):
        good = fleet.offer(_bundle(tmp_path, 2), version=2)
        fleet.wait_for(lambda f: any(r.phase == "progress" for r in f.of(Report)))
        bad = _bundle(tmp_path, **{"version": 3, **fields})
        fleet.spoil = wrong
        offered = fleet.offer(spoil(bad) if spoil else bad, **{"version": 3, **said})
        fleet.wait_for(lambda f: "refused" in f.states())
        seen = fleet.of(Report)[-1].seen
        end = fleet.wait_for_end()
    refusal = fleet.of(Reported)[-1]
    assert refusal.bundle == offered
    assert refusal.detail
    assert any(event.kind == "bundle_refused" for event in fleet.of(Event))
    assert end.bundle == good
    assert seen < end.seen == end.learned == 400
    assert Store(tmp_path / "state", TRUST).current() == good.digest


@pytest.mark.parametrize("size_bytes", [0, -1, 2**53 - 1, 2**62, 2**70])
def test_an_absurd_offer_does_not_kill_the_agent(broker, fleet, tmp_path, size_bytes):
    """No memory is taken for what nobody can send."""
    with _running(broker, _config(tmp_path / "state")) as hub:
        fleet.wait_for(lambda f: f.of(Birth))
        ref = {"name": "toy", "version": 1, "digest": "a" * 64}
        fleet.say(Offer, json.dumps({"bundle": ref, "size_bytes": size_bytes}).encode())
        fleet.offer(_bundle(tmp_path))
        fleet.wait_for(lambda f: "active" in f.states())
        assert not hub.transport.handler_errors


@pytest.mark.parametrize("chunks", [1, 7, 20])
def test_a_pull_goes_on_after_a_lost_connection(broker, fleet, tmp_path, chunks):
    with _running(broker, _config(tmp_path / "state")) as hub:
        fleet.wait_for(lambda f: f.of(Birth))
        fleet.serve = chunks
        fleet.offer(_bundle(tmp_path, files=BALLAST))
        fleet.wait_for(lambda f: len(f.served) == chunks)
        status = hub.deployment
        assert wait_until(lambda: f"{chunks}/21" in (status.waits_for or ""))
        hub.transport.drop()
        fleet.wait_for(lambda f: not f.of(Status)[-1].online)
        first, fleet.served, fleet.serve = fleet.served, [], 10**9
        hub.transport.restore()
        fleet.wait_for(lambda f: "active" in f.states())
        assert sorted(first + fleet.served) == list(range(21)), "no chunk is asked for twice"
        assert fleet.of(Status)[-1] == Status(online=True, session=SESSION)


def test_a_pull_goes_on_after_a_restart(broker, fleet, tmp_path):
    config = _config(tmp_path / "state")
    fleet.serve = 5
    with _running(broker, config) as hub:
        fleet.offer(_bundle(tmp_path, files=BALLAST))
        deploy = hub.deployment
        assert wait_until(lambda: "5/21" in (deploy.waits_for or ""))
    fleet.serve = 10**9
    with _running(broker, config, session="b" * 16):
        fleet.wait_for(lambda f: "active" in f.states())
    assert sorted(fleet.served) == list(range(21))


def test_a_restart_resumes_without_counting_twice(broker, fleet, tmp_path):
    config = _config(tmp_path / "state", _stream(tmp_path, 200), interval_s=0.005)
    with _running(broker, config) as hub:
        fleet.offer(_bundle(tmp_path))
        fleet.wait_for(lambda f: any(r.phase == "progress" for r in f.of(Report)))
    before = hub.deployment.student
    taken, theta = before.tally.taken, before.learner.engine.theta
    assert 0 < taken < 400
    with _running(broker, config, session="b" * 16) as hub:
        first = hub.deployment
        assert wait_until(lambda: first.student is not None)
        end = fleet.wait_for_end()
        assert fleet.of(Birth)[-1].bundle is not None
    assert (end.seen, end.learned, end.prequential.n) == (400, 400, 400)
    assert len(fleet.of(ChunkRequest)) == 1, "the bundle was here already"
    reports = fleet.reports()
    assert sum(r.phase == "baseline" for r in reports) == 1
    assert [r.seen for r in reports] == sorted(r.seen for r in reports)
    assert theta.shape == hub.deployment.student.learner.engine.theta.shape


def test_a_restart_after_the_end_of_the_stream_learns_nothing_twice(broker, fleet, tmp_path):
    config = _config(tmp_path / "state", _stream(tmp_path))
    with _running(broker, config) as hub:
        fleet.offer(_bundle(tmp_path))
        fleet.wait_for_end()
    theta = hub.deployment.student.learner.engine.theta
    with _running(broker, config, session="b" * 16) as hub:
        fleet.wait_for(lambda f: f.of(Birth)[-1].session == "b" * 16)
        again = hub.deployment.student
        assert again.tally.seen == 120
        assert np.array_equal(again.learner.engine.theta, theta)


def test_a_power_cut_loses_the_open_experience_at_most(broker, fleet, tmp_path):
    config = _config(tmp_path / "state", _stream(tmp_path, 200), interval_s=0.002)
    with _running(broker, config):
        fleet.offer(_bundle(tmp_path))
        fleet.wait_for(lambda f: any(r.phase == "experience" for r in f.of(Report)))
        shutil.copytree(
            tmp_path / "state",
            tmp_path / "copy",
            ignore=shutil.ignore_patterns("outbox*", "*.part"),
        )
        fleet.wait_for_end()
    fleet.heard.clear()
    stream = tmp_path / "stream.npz"
    with _running(broker, _config(tmp_path / "copy", stream), session="c" * 16) as hub:
        deploy = hub.deployment
        assert wait_until(lambda: deploy.student is not None)
        end = fleet.wait_for_end()
    assert (end.seen, end.learned, end.prequential.n) == (400, 400, 400)
    assert [r.experience for r in fleet.reports() if r.phase == "experience"] == [2]


def test_refused_samples_are_counted(broker, fleet, tmp_path):
    x, y = toy((2,), 40)
    x[3], y[7], y[9] = np.nan, CAPACITY, -1
    stream = write_stream(tmp_path / "s.npz", (x, y))
    with _running(broker, _config(tmp_path / "state", stream)):
        fleet.offer(_bundle(tmp_path))
        end = fleet.wait_for_end()
    assert (end.seen, end.learned, end.refused, end.prequential.n) == (38, 37, 2, 37)
    assert "40 samples taken" in fleet.of(Event)[-1].detail


def test_drift_is_an_event_as_soon_as_it_is_seen(broker, fleet, tmp_path):
    x, y = toy(BASE, 300, shift=2.5)
    stream = write_stream(tmp_path / "s.npz", (x, np.full_like(y, -1)))
    with _running(broker, _config(tmp_path / "state", stream)):
        fleet.offer(_bundle(tmp_path))
        end = fleet.wait_for_end()
        assert end.evidence["novelty"].peak > end.evidence["novelty"].threshold
        assert "drift" in [event.kind for event in fleet.of(Event)]


def test_a_second_bundle_on_the_same_backbone_keeps_the_buffer(broker, fleet, tmp_path):
    with _running(broker, _config(tmp_path / "state", _stream(tmp_path))) as hub:
        fleet.offer(_bundle(tmp_path))
        end = fleet.wait_for_end()
        second = fleet.offer(_bundle(tmp_path, 2), version=2)
        fleet.wait_for(lambda f: f.of(Report)[-1].phase == "activated")
        assert "kept 60 replay entries" in fleet.of(Reported)[-1].detail
        after = fleet.of(Report)[-1]
        assert after.bundle == second == fleet.of(Birth)[-1].bundle
        assert (after.seen, after.prequential) == (end.seen, end.prequential)
        assert hub.deployment.student.learner.known_classes == (0, 1, 2, 3)


def test_it_works_without_a_broker_and_reports_later(broker, fleet, tmp_path):
    class Late(MemoryTransport):
        def connect(self, timeout_s):
            raise TransportError("no network")

    config = _config(tmp_path / "state", _stream(tmp_path, 100), interval_s=0.01)
    with _running(broker, config):
        fleet.offer(_bundle(tmp_path))
        fleet.wait_for(lambda f: f.of(Report))
    seen = fleet.of(Report)[-1].seen
    fleet.heard.clear()
    with _running(broker, config, session="b" * 16, kind=Late) as hub:
        deploy = hub.deployment
        assert wait_until(lambda: deploy.student and deploy.student.tally.seen == 200)
        assert not fleet.of(Report)
        hub.transport.restore()
        end = fleet.wait_for_end()
    assert end.seen == 200 > seen
    assert [r.seen for r in fleet.reports()] == sorted(r.seen for r in fleet.reports())


@pytest.mark.parametrize("kind", [Offer, Chunk, Command, UpdateRequest])
def test_garbage_does_not_stop_it(broker, fleet, tmp_path, kind):
    with _running(broker, _config(tmp_path / "state")) as hub:
        fleet.wait_for(lambda f: f.of(Birth))
        for payload in (b"", b"{}", b"\xff" * 9, b"[]", b"null", b"{" * 5000, b"\x9f" * 5000):
            fleet.say(kind, payload)
        fleet.offer(_bundle(tmp_path))
        fleet.wait_for(lambda f: "active" in f.states())
        assert not hub.transport.handler_errors


def test_an_offer_that_comes_again_is_answered_and_not_pulled(broker, fleet, tmp_path):
    with _running(broker, _config(tmp_path / "state")) as hub:
        fleet.offer(_bundle(tmp_path))
        fleet.wait_for(lambda f: "active" in f.states())
        births = len(fleet.of(Birth))
        hub.transport.drop()
        hub.transport.restore()
        fleet.wait_for(lambda f: len(f.of(Birth)) > births)
        fleet.wait_for(lambda f: f.states().count("active") >= 2)
        assert len(fleet.of(ChunkRequest)) == 1


def test_a_missing_stream_file_is_no_fault_of_the_bundle(broker, fleet, tmp_path):
    """Whether the agent refuses to start, or goes on without a stream: the bundle is good."""
    config = _config(tmp_path / "state", tmp_path / "absent.npz")
    with contextlib.suppress(DataError), _running(broker, config) as hub:
        fleet.offer(_bundle(tmp_path))
        assert wait_until(lambda: hub.died or {"active", "refused"} & set(fleet.states()))
        wait_until(lambda: hub.died or "refused" in fleet.states(), 0.3)
    assert "refused" not in fleet.states()
    store = Store(tmp_path / "state", TRUST)
    current = store.current()
    assert current is None or store.bundle_path(current).exists()


def test_the_will_says_offline_for_this_session(tmp_path):
    will = last_will(_config(tmp_path), SESSION)
    assert will.topic == "el/v1/home/d/hub/status"
    assert Status.decode(will.payload) == Status(online=False, session=SESSION)
    assert will.retain


def test_the_birth_says_graph_by_graph_what_runs(broker, fleet, tmp_path):
    with _running(broker, _config(tmp_path / "state", _stream(tmp_path))):
        fleet.wait_for(lambda f: f.of(Birth))
        fleet.offer(_bundle(tmp_path))
        fleet.wait_for(lambda f: f.of(Birth)[-1].bundle)
    before, after = fleet.of(Birth)[0], fleet.of(Birth)[-1]
    assert before.placements == ()
    assert after.provider == "CPUExecutionProvider"
    assert [(item.graph, item.provider) for item in after.placements] == [
        ("backbone", after.provider), ("tail", after.provider), ("step", after.provider),
    ]  # fmt: skip


def test_the_status_file_says_what_a_person_asks(broker, fleet, tmp_path):
    config = _config(tmp_path / "state", _stream(tmp_path))
    with _running(broker, config):
        fleet.wait_for(lambda f: f.of(Birth))
        fleet.offer(_bundle(tmp_path))
        fleet.wait_for_end()
    status = read_status(tmp_path / "state")
    assert status["bundle"] == "toy 1"
    assert status["engine"] == "step-graph"
    assert [item["graph"] for item in status["placements"]] == ["backbone", "tail", "step"]
    assert status["classes"] == ["ash", "birch", "cedar", "dogwood"]
    assert status["replay_entries"] == 60
    assert status["tally"]["seen"] == 120
    assert status["learning"] == "no: the stream has ended"
    assert json.dumps(status)


def test_the_status_of_an_agent_without_bundle_or_stream(broker, fleet, tmp_path):
    with _running(broker, _config(tmp_path / "state")):
        fleet.wait_for(lambda f: f.of(Birth))
    assert read_status(tmp_path / "state")["bundle"] is None
    with _running(broker, _config(tmp_path / "state")):
        fleet.offer(_bundle(tmp_path))
        fleet.wait_for(lambda f: "active" in f.states())
    assert read_status(tmp_path / "state")["learning"] == "no: no stream is configured"
