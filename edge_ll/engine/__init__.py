"""Engines: the student on a runtime. One port, three implementations, one contract suite."""

from __future__ import annotations

import os

from edge_ll.engine.port import (
    MASKED,
    Batch,
    Engine,
    EngineInfo,
    EngineState,
    plain_batch,
)

__all__ = ["MASKED", "Batch", "Engine", "EngineInfo", "EngineState", "plain_batch"]

# Since 1.29 the stock ONNX Runtime reports over the network what it runs, from a thread and a
# database of its own. A device here speaks with its own fleet only. The runtime reads this when it
# is imported, hence here; who wants the reports sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
