"""ONNX Runtime sessions, made from bytes: options, providers, and errors in the project's words."""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import Annotated, Any

import msgspec
import onnxruntime as ort

from edge_ll.config import Section
from edge_ll.engine.port import Placement
from edge_ll.engine.providers import PROVIDERS, check_names, kleidiai_hoards
from edge_ll.errors import EngineError

log = logging.getLogger(__name__)

Positive = Annotated[int, msgspec.Meta(ge=1)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]

_CPUINFO = Path("/proc/cpuinfo")
_arena: dict[str, int] = {}


class RuntimeOptions(Section, frozen=True, kw_only=True):
    """How the runtime may use the machine; ``docs/research/runtime.md`` has what each costs.

    Attributes:
        providers: Execution providers in order of preference.
        threads: Threads within one operator.
        spinning: Whether idle threads spin: quicker answers for a busy core.
        arena: Whether all sessions of the process share one pool of memory that is kept between
            calls; without it every tensor is allocated and freed.
        arena_limit_bytes: The pool's limit; a call that needs more is refused. 0: none. The first
            session of a process sets it.
    """

    providers: tuple[str, ...] = ("cpu",)
    threads: Positive = 1
    spinning: bool = False
    arena: bool = True
    arena_limit_bytes: NotNegative = 0


def session_options(options: RuntimeOptions) -> Any:
    """ONNX Runtime's options.

    Raises:
        EngineError: This process has a pool of memory with another limit already.
    """
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.enable_cpu_mem_arena = options.arena
    # A plan is kept for every batch size ever seen, each with a block of memory of its own.
    settings.enable_mem_pattern = False
    settings.log_severity_level = 3
    entries = {
        # Never guess the format: the runtime's own would bypass the scan for foreign operators.
        "session.load_model_format": "ONNX",
        "session.intra_op.allow_spinning": "1" if options.spinning else "0",
        "session.record_ep_graph_assignment_info": "1",
    }
    if options.arena:
        _share_arena(options.arena_limit_bytes)
        entries["session.use_env_allocators"] = "1"
    if kleidiai_hoards(platform.system(), platform.machine(), _processor_features()):
        entries["mlas.disable_kleidiai"] = "1"
    for key, value in entries.items():  # a runtime ignores keys that it does not know
        settings.add_session_config_entry(key, value)
    return settings


def open_session(name: str, model: bytes, options: RuntimeOptions) -> Any:
    """An inference session on the first wanted provider that works.

    ONNX Runtime itself falls back to the CPU with a line in its log; here that is an error unless
    ``cpu`` comes next in the list.

    Raises:
        EngineError: No wanted provider works here, or the runtime refuses the graph.
    """
    here = choose_providers(options.providers)
    reasons, refused = [], False
    for wanted in options.providers:
        if wanted not in here:
            extra = PROVIDERS[wanted].extra
            reasons.append(
                f'{wanted} is not in this build (run: pip install "edge-ll[{extra}]" in a venv of '
                "its own)"
            )
            continue
        try:
            session = _session(model, wanted, options)
        except Exception as error:  # noqa: BLE001  # the runtime's exceptions share no base
            reasons.append(f"{wanted}: {error}")
            refused = True
            continue
        lacking = _lacking(placement(name, session), wanted)
        if lacking is None:
            if reasons:
                log.warning("provider.passed_over", extra={"graph": name, "reasons": reasons})
            return session
        reasons.append(lacking)
    if refused:
        raise EngineError(f"{name}: {runtime_name()} refuses it: {'; '.join(reasons)}")
    raise EngineError(
        f"{name}: no wanted provider works: {'; '.join(reasons)}. {runtime_name()} holds "
        f'{", ".join(ort.get_available_providers())}; add "cpu" to the list to fall back to it'
    )


def choose_providers(wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The wanted providers that are in this build, in order; a session says whether one loads.

    Raises:
        EngineError: An unknown name, or an empty list.
    """
    check_names(wanted)
    here = ort.get_available_providers()
    return tuple(name for name in wanted if PROVIDERS[name].ort_name in here)


def placement(name: str, session: Any) -> Placement:
    """Where a session really runs; the nodes are counted by ONNX Runtime 1.24 and newer."""
    chosen: str = session.get_providers()[0]
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return Placement(name, chosen)
    nodes = placed = 0
    for part in session.get_provider_graph_assignment_info():
        count = len(part.get_nodes())
        nodes += count
        placed += count if part.ep_name == chosen else 0
    return Placement(name, chosen, nodes, placed)


def run(session: Any, outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
    """Run a session.

    Raises:
        EngineError: The runtime refused the input or failed.
    """
    try:
        results: list[Any] = session.run(outputs, feeds)
    except Exception as error:  # the runtime's exceptions share no base
        raise EngineError(f"{outputs[0]}: {error}") from error
    return results


def runtime_name() -> str:
    """Package and version, for people."""
    return f"onnxruntime {ort.__version__}"


def _session(model: bytes, wanted: str, options: RuntimeOptions) -> Any:
    provider = PROVIDERS[wanted]
    providers: list[Any] = [(provider.ort_name, provider.options(options.threads))]
    if wanted != "cpu":
        providers.append(PROVIDERS["cpu"].ort_name)  # for the nodes that the provider lacks
    session = ort.InferenceSession(
        model, session_options(options), providers=providers, enable_fallback=0
    )
    session.disable_fallback()  # when a run fails, too
    # The model is kept for that fallback alone.
    session._model_bytes = None  # noqa: SLF001
    return session


def _lacking(where: Placement, wanted: str) -> str | None:
    """Why a session does not run on the wanted provider; None where it does."""
    if where.provider != PROVIDERS[wanted].ort_name:
        return (
            f"{wanted} is in this build but did not load (it needs {PROVIDERS[wanted].needs}; the "
            "runtime's log says more)"
        )
    if where.placed == 0 and where.nodes:
        return f"{wanted} took none of the graph's {where.nodes} nodes"
    return None


def _share_arena(limit_bytes: int) -> None:
    """Register the pool that all sessions of this process share, once.

    Raises:
        EngineError: It has another limit.
    """
    if not _arena:
        memory = ort.OrtMemoryInfo(
            "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
        )
        as_requested = {"max_mem": limit_bytes, "arena_extend_strategy": 1}
        ort.create_and_register_allocator(memory, ort.OrtArenaCfg(as_requested))
        _arena["limit_bytes"] = limit_bytes
    if _arena["limit_bytes"] != limit_bytes:
        raise EngineError(
            f"arena_limit_bytes: this process has a pool limited to {_arena['limit_bytes']} bytes "
            f"already, got {limit_bytes}; open all engines of a process with the same limit"
        )


def _processor_features() -> frozenset[str]:
    """What Linux on arm64 says that the processor can do; empty where it says nothing."""
    try:
        lines = _CPUINFO.read_text("utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(
        word for line in lines if line.startswith("Features") for word in line.split()[2:]
    )
