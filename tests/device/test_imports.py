"""The agent is light: what must never be loaded on a device is not."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.tiny_bundle import SIGNER, toy, write_stream, write_tiny_bundle

HEAVY = (
    "torch",
    "onnx",
    "onnxscript",
    "scipy",
    "sklearn",
    "pandas",
    "matplotlib",
    "sqlalchemy",
    "amqtt",
    "edge_ll_export",
    "edge_ll.fleet",
    "edge_ll.cli",
)

LEARN = """
from edge_ll_device.cli import main
code = main(["learn", "toy.bundle", "--trust", "key.pub", "--stream", "s.npz"])
assert code == 0
"""
PREDICT = """
from edge_ll_device.cli import main
code = main(["predict", "toy.bundle", "--trust", "key.pub", "--input", "x.npy"])
assert code == 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import numpy as np

    made = tmp_path_factory.mktemp("imports")
    write_tiny_bundle(made / "toy.bundle")
    (made / "key.pub").write_text(SIGNER.public_key.hex(), encoding="ascii")
    np.save(made / "x.npy", toy((0, 1), 4)[0])
    write_stream(made / "s.npz", toy((2,), 16))
    return made


def _loaded(code: str, folder) -> set[str]:
    code += "\nimport sys, json; print('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def of_the_runtime(folder) -> set[str]:
    """onnxruntime-training itself loads torch and what comes with it, where they are installed."""
    return _loaded("import onnxruntime", folder)


@pytest.mark.parametrize(
    "code",
    [
        "import edge_ll_device.agent, edge_ll_device.cli, edge_ll_device.offline",
        "import edge_ll.transport.mqtt, edge_ll.engine.load, edge_ll.engine.step_graph",
        "import edge_ll.engine.ort_training",
        LEARN,
        PREDICT,
    ],
    ids=["agent", "transport and engine", "ort-training", "learn", "predict"],
)
def test_nothing_heavy_is_loaded(code, folder, of_the_runtime):
    assert not (set(HEAVY) & _loaded(code, folder)) - of_the_runtime


def test_the_command_itself_loads_no_runtime(folder):
    """So that ``--help`` and ``status`` answer at once."""
    loaded = _loaded("import edge_ll_device.cli", folder)
    assert loaded.isdisjoint({*HEAVY, "onnxruntime", "numpy", "paho"})


def test_the_agent_s_logic_needs_no_network_library(folder):
    code = "import edge_ll_device.agent, edge_ll_device.learner, edge_ll_device.student"
    assert _loaded(code, folder).isdisjoint({"paho", "paho.mqtt", "onnxruntime"})
