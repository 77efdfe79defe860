"""Engines: the student on a runtime. One port, three implementations, one contract suite."""

from __future__ import annotations

from edge_ll.engine.port import (
    MASKED,
    Batch,
    Engine,
    EngineInfo,
    EngineState,
    plain_batch,
)

__all__ = ["MASKED", "Batch", "Engine", "EngineInfo", "EngineState", "plain_batch"]
