"""The demo's run: train, export, start broker, fleet and agents, learn, merge, roll out."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edge_ll import config
from edge_ll.cli.demo.agents import (
    AgentError,
    AgentProcess,
    device_python,
    learn_naively,
    write_config,
)
from edge_ll.cli.demo.streams import Stream, device_streams
from edge_ll.engine.load import open_engine
from edge_ll.errors import TransportError
from edge_ll.fleet.broker import EmbeddedBroker
from edge_ll.fleet.evaluation import holdout_evaluator
from edge_ll.fleet.merging import MergeResult
from edge_ll.fleet.registry import DATABASE, Registry
from edge_ll.fleet.server import FleetServer
from edge_ll.messages import Address, BundleRef, Offer, Report, Reported, Status
from edge_ll.transport.mqtt import MqttTransport
from edge_ll.trust import Signer, TrustStore
from edge_ll_export.pack import export_bundle
from edge_ll_export.pipeline import Trained, train
from edge_ll_export.recipe import Recipe

if TYPE_CHECKING:
    from edge_ll.bundle import Bundle

_CONNECT_S = 10.0
_WAIT_S = 120.0
_POLL_S = 0.1


class Console(Protocol):
    """What the run tells while it works."""

    def stage(self, text: str) -> None:
        """A new stage begins."""
        ...

    def progress(self, what: str, done: int, total: int) -> None:
        """``what`` has come this far."""
        ...


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        recipe_file: The recipe.
        folder: Where everything goes; emptied first of what an earlier demo left.
        engine: The agents' engine.
        broker: URL of a running broker; None starts the embedded one.
        device_python: The agents' interpreter; None finds it.
        devices: How many.
    """

    recipe_file: Path
    folder: Path
    engine: str = "step-graph"
    broker: str | None = None
    device_python: Path | None = None
    devices: int = 3


@dataclass(frozen=True)
class Run:
    """Everything that was measured, as it came."""

    trained: Trained
    bundle: Bundle
    streams: list[Stream]
    reports: dict[str, list[Report]]
    alarms: dict[str, int]
    naive: list[dict[str, object]]
    merge: MergeResult
    broker: str
    engine: str
    torch_free: bool
    steps: list[tuple[str, float]]


def run_lifecycle(options: Options, console: Console) -> Run:
    """Do it all; every process started here is ended here.

    Raises:
        EdgeLLError: What failed, and what to do.
    """
    python = device_python(options.engine, options.device_python)
    recipe = config.load(options.recipe_file, Recipe)
    folder = options.folder
    for name in ("agents", "fleet", "keys", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    clock = _Stages(console)

    with clock.stage("train teacher and student"):
        trained = train(
            recipe, on_progress=lambda stage, at, of, _: console.progress(stage, at, of)
        )
    signer = Signer.load_or_create(folder / "keys" / "signing.pem")
    bundle_file = folder / f"{recipe.name}-1.bundle"
    with clock.stage("export and verify the bundle"):
        bundle, _ = export_bundle(trained, bundle_file, signer)
    streams = device_streams(
        recipe,
        trained.dataset,
        trained.split,
        devices=options.devices,
        drifting=options.devices - 1,
    )
    with ExitStack() as stack:
        with clock.stage("start broker, fleet and agents"):
            fleet = _Fleet(stack, options, signer)
            names = [f"hub-{number + 1}" for number in range(options.devices)]
            fleet.server.push(bundle_file)
            agents = _start_agents(stack, options, python, fleet, names, streams)
            fleet.wait(agents, lambda: all(fleet.reports(n) for n in names), "the first reports")
        with clock.stage("learn on the devices"):
            _watch_streams(fleet, agents, names, streams, console)
            torch_free = all(agent.has_torch() is False for agent in agents)
        with clock.stage("learn again without replay"):
            naive = learn_naively(
                python,
                bundle_file,
                folder / "keys" / "signing.pem.pub",
                [folder / "agents" / f"{name}.npz" for name in names],
                engine=options.engine,
            )
        with clock.stage("merge, check and roll out"):
            merge = _merge(fleet, trained, bundle, names)
            if merge.bundle is not None:
                fleet.wait_for_bundle(agents, names, merge.bundle)
    return Run(
        trained=trained,
        bundle=bundle,
        streams=streams,
        reports={name: fleet.last_reports[name] for name in names},
        alarms={name: fleet.alarms[name] for name in names},
        naive=naive,
        merge=merge,
        broker=_without_password(options.broker) or "amqtt (embedded)",
        engine=fleet.engines,
        torch_free=torch_free,
        steps=clock.steps,
    )


def _without_password(url: str | None) -> str | None:
    return None if url is None else url.rsplit("@", 1)[-1]


class _Stages:
    """Measures the stages."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.steps: list[tuple[str, float]] = []

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        self._console.stage(text)
        started = time.perf_counter()
        yield
        self.steps.append((text, time.perf_counter() - started))


class _Fleet:
    """Broker, registry and server, ended with the stack that they were started on."""

    def __init__(self, stack: ExitStack, options: Options, signer: Signer) -> None:
        self.folder = options.folder
        # On somebody's broker the demo keeps to a tenant of its own, and cleans up after itself.
        self.tenant = "demo" if options.broker is None else f"demo-{secrets.token_hex(4)}"
        self.url = options.broker or stack.enter_context(EmbeddedBroker()).url
        self.trust = TrustStore([signer.public_key])
        self.public_key = signer.public_key.hex()
        self._registry = Registry(options.folder / "fleet" / DATABASE)
        stack.callback(self._registry.close)
        self._transport = MqttTransport(self.url, client_id=f"fleet-{self.tenant}")
        stack.callback(self._transport.close)
        if options.broker is not None:
            stack.callback(self._forget_retained)
        self.server = FleetServer(
            self._transport,
            self._registry,
            tenant=self.tenant,
            folder=options.folder / "fleet",
            trust=self.trust,
            signer=signer,
        )
        stack.callback(self._keep_results)
        self.server.start()
        stack.callback(self.server.stop)
        self._transport.connect(_CONNECT_S)
        self.last_reports: dict[str, list[Report]] = {}
        self.alarms: dict[str, int] = {}
        self.engines = ""

    def reports(self, device: str) -> list[Report]:
        """All of a device's reports in the order of arrival."""
        return [row.report() for row in self._registry.reports(self.tenant, device)]

    def ended(self, device: str) -> bool:
        """Whether the device's stream has ended."""
        events = self._registry.events(self.tenant, device)
        return any(event.kind == "stream_ended" for event in events)

    def wait(
        self, agents: Sequence[AgentProcess], condition: Callable[[], bool], what: str
    ) -> None:
        """Wait until a condition holds, as long as all agents live.

        Raises:
            AgentError: An agent ended, or the time was up.
        """
        deadline = time.monotonic() + _WAIT_S
        while not condition():
            for agent in agents:
                agent.check()
            if time.monotonic() > deadline:
                raise AgentError(
                    f"waited {_WAIT_S:.0f} s in vain for {what}; see {self.folder / 'logs'}"
                )
            time.sleep(_POLL_S)

    def wait_for_bundle(
        self, agents: Sequence[AgentProcess], names: Sequence[str], bundle: BundleRef
    ) -> None:
        """Wait until every agent has measured itself on a bundle."""

        def everywhere() -> bool:
            return all(
                any(report.bundle.digest == bundle.digest for report in self.reports(name))
                for name in names
            )

        self.wait(agents, everywhere, f"every agent to run version {bundle.version}")

    def _keep_results(self) -> None:
        """Read the registry for the last time, after the server has stopped."""
        rows = self._registry.devices(self.tenant)
        self.engines = ", ".join(sorted({f"{row.engine} ({row.runtime})" for row in rows}))
        for row in rows:
            self.last_reports[row.device] = self.reports(row.device)
            # An alarm that lasts is raised again for the next bundle, but is one alarm.
            alarms = self._registry.alarms(self.tenant, row.device)
            self.alarms[row.device] = len({(alarm.signal, alarm.session) for alarm in alarms})

    def _forget_retained(self) -> None:
        """Remove what the demo left on somebody's broker."""
        for row in self._registry.devices(self.tenant):
            for kind in (Status, Offer, Reported):
                topic = kind.topic(Address(self.tenant, row.device))
                try:
                    self._transport.publish(topic, b"", retain=True).wait(_CONNECT_S)
                except TransportError:
                    return


def _start_agents(
    stack: ExitStack,
    options: Options,
    python: Path,
    fleet: _Fleet,
    names: Sequence[str],
    streams: Sequence[Stream],
) -> list[AgentProcess]:
    agents = []
    folder = options.folder / "agents"
    for number, (name, stream) in enumerate(zip(names, streams, strict=True)):
        stream.save(folder / f"{name}.npz")
        write_config(
            folder / f"{name}.toml",
            device=name,
            seed=number,
            tenant=fleet.tenant,
            broker=fleet.url,
            trusted_key=fleet.public_key,
            engine=options.engine,
        )
        log_file = options.folder / "logs" / f"{name}.log"
        agent = AgentProcess(python, folder / f"{name}.toml", log_file)
        stack.callback(agent.stop)
        agents.append(agent)
    return agents


def _watch_streams(
    fleet: _Fleet,
    agents: Sequence[AgentProcess],
    names: Sequence[str],
    streams: Sequence[Stream],
    console: Console,
) -> None:
    def all_ended() -> bool:
        for name, stream in zip(names, streams, strict=True):
            reports = fleet.reports(name)
            console.progress(name, reports[-1].seen if reports else 0, len(stream.x))
        return all(fleet.ended(name) for name in names)

    fleet.wait(agents, all_ended, "the streams to end")


def _merge(fleet: _Fleet, trained: Trained, bundle: Bundle, names: Sequence[str]) -> MergeResult:
    rows = trained.split.holdout
    evaluate = holdout_evaluator(
        open_engine(bundle), bundle, trained.dataset.x[rows], trained.dataset.y[rows]
    )
    return fleet.server.merge_round(
        names, evaluate, timeout_s=_WAIT_S, max_forgetting=trained.recipe.gate.max_forgetting
    )
