"""Bundles with torch's tails for environments without torch: ``python -m tests.provider_students``.

``tests/contract/test_providers.py`` reads them from the folder that EDGE_LL_STUDENTS names.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.tiny_bundle import TAILS, write_torch_bundle

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for kind in TAILS:
        write_torch_bundle(folder / f"{kind}.bundle", kind)
