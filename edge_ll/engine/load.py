"""Open the engine that a bundle and this machine have in common."""

from __future__ import annotations

from typing import Literal

from edge_ll.bundle import Bundle
from edge_ll.engine.port import Engine
from edge_ll.engine.providers import require_cpu
from edge_ll.errors import EngineError, MissingExtraError
from edge_ll.manifest import EngineName


def open_engine(
    bundle: Bundle,
    name: EngineName | Literal["auto"] = "auto",
    *,
    providers: tuple[str, ...] = ("cpu",),
    threads: int = 1,
    spinning: bool = False,
    arena: bool = True,
    arena_limit_bytes: int = 0,
) -> Engine:
    """Build an engine; ``auto`` is the step graph, which every runtime runs.

    The options are those of :class:`edge_ll.engine.runtime.RuntimeOptions`.

    Raises:
        EngineError: The bundle lacks the engine's files, the runtime cannot run them, or none of
            the providers works here.
        MissingExtraError: No onnxruntime is installed.
    """
    try:
        from edge_ll.engine.runtime import RuntimeOptions  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtraError("running a bundle", "device") from error
    wanted: EngineName = "step-graph" if name == "auto" else name
    if wanted not in bundle.manifest.engines:
        held = ", ".join(bundle.manifest.engines)
        raise EngineError(
            f"{bundle.manifest.name} holds no engine {wanted!r}; it holds: {held}. Name one of "
            "these, or auto"
        )
    options = RuntimeOptions(
        providers=providers,
        threads=threads,
        spinning=spinning,
        arena=arena,
        arena_limit_bytes=arena_limit_bytes,
    )
    if wanted == "ort-training":
        require_cpu(providers, wanted)
        from edge_ll.engine.ort_training import OrtTrainingEngine  # noqa: PLC0415

        return OrtTrainingEngine(bundle, options)
    from edge_ll.engine.step_graph import StepGraphEngine  # noqa: PLC0415

    return StepGraphEngine(bundle, options)
