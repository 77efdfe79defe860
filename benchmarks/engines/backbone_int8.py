"""The int8 backbone next to the float32 one, where the export can make one.

Runs where torch is: ``python -m benchmarks.engines.backbone_int8`` prints one JSON value.
"""

from __future__ import annotations

import importlib
import json
from importlib.util import find_spec
from typing import Any

_MODULE = "edge_ll_export.quantize_backbone"


def measure() -> dict[str, Any] | None:
    """``{"speedup": float32 time / int8 time, "acc_change": int8 - float32}``, or None."""
    if find_spec(_MODULE) is None:
        return None
    speed = getattr(importlib.import_module(_MODULE), "measure_speed", None)
    measured: dict[str, Any] | None = speed() if speed else None
    return measured


if __name__ == "__main__":
    print(json.dumps(measure()))
