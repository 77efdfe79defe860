"""ONNX Runtime sessions, made from bytes: options, providers, and errors in the project's words."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import onnxruntime as ort

from edge_ll.config import Section
from edge_ll.errors import EngineError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

Positive = Annotated[int, msgspec.Meta(ge=1)]


class RuntimeOptions(Section, frozen=True, kw_only=True):
    """How the runtime may use the machine.

    Attributes:
        providers: Execution providers in order of preference.
        threads: Threads within one operator.
        spinning: Whether idle threads spin: quicker answers for a busy core.
    """

    providers: tuple[str, ...] = ("cpu",)
    threads: Positive = 1
    spinning: bool = False


def session_options(options: RuntimeOptions) -> Any:
    """ONNX Runtime's options; memory is given back rather than hoarded in an arena."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.enable_cpu_mem_arena = False
    settings.log_severity_level = 3
    # Never guess the format: the runtime's own would bypass the scan for foreign operators.
    settings.add_session_config_entry("session.load_model_format", "ONNX")
    spin = "1" if options.spinning else "0"
    settings.add_session_config_entry("session.intra_op.allow_spinning", spin)
    return settings


def open_session(name: str, model: bytes, options: RuntimeOptions) -> Any:
    """An inference session.

    Raises:
        EngineError: No wanted provider is here, or the runtime refuses the graph.
    """
    try:
        return ort.InferenceSession(
            model, session_options(options), providers=choose_providers(options.providers)
        )
    except Exception as error:  # the runtime's exceptions share no base
        raise EngineError(f"{name}: {runtime_name()} refuses it: {error}") from error


def choose_providers(wanted: tuple[str, ...]) -> list[str]:
    """The first wanted provider that is here, the CPU behind it for operators that it lacks.

    Raises:
        EngineError: An unknown name, or none of them is here.
    """
    unknown = sorted(set(wanted) - set(PROVIDERS))
    if unknown or not wanted:
        known = ", ".join(PROVIDERS)
        raise EngineError(f"providers: expected some of {known}; got {', '.join(wanted) or 'none'}")
    here = ort.get_available_providers()
    for name in wanted:
        if PROVIDERS[name] in here:
            return list(dict.fromkeys([PROVIDERS[name], PROVIDERS["cpu"]]))
    raise EngineError(
        f"none of the providers {', '.join(wanted)} is in {runtime_name()} ({', '.join(here)}); "
        'add "cpu" to the list to fall back to it'
    )


def runtime_name() -> str:
    """Package and version, for people."""
    return f"onnxruntime {ort.__version__}"


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
