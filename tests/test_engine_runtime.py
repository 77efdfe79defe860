"""Which provider is taken, what the runtime is told, and what it costs in memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from edge_ll.engine import runtime
from edge_ll.engine.load import open_engine
from edge_ll.engine.providers import PROVIDERS, kleidiai_hoards
from edge_ll.engine.runtime import RuntimeOptions, open_session, session_options
from edge_ll.errors import EngineError
from edge_ll_device.config import Provider, RuntimeConfig
from tests.tiny_bundle import backbone_graph, write_tiny_bundle

ort = pytest.importorskip("onnxruntime")

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
ROOT = Path(__file__).resolve().parents[1]


class Part:
    """Nodes that ONNX Runtime gave to a provider."""

    def __init__(self, ep_name: str, nodes: int) -> None:
        self.ep_name = ep_name
        self._nodes = nodes

    def get_nodes(self) -> list[None]:
        return [None] * self._nodes


def _session_of(loaded: list[str], parts: list[Part]) -> type:
    """An InferenceSession on ``loaded``, whatever is asked for; it falls back as the real one."""

    class Session:
        def __init__(self, model, options, *, providers, enable_fallback) -> None:
            assert not enable_fallback
            asked = [item[0] if isinstance(item, tuple) else item for item in providers]
            self._loaded = [name for name in asked if name in loaded]
            self._parts = [part for part in parts if part.ep_name in self._loaded]

        def get_providers(self) -> list[str]:
            return self._loaded

        def get_provider_graph_assignment_info(self) -> list[Part]:
            return self._parts

        def disable_fallback(self) -> None:
            pass

    return Session


@pytest.fixture
def gpu_build(monkeypatch):
    """A build with CUDA in it, on a machine where only ``loaded`` can be loaded."""

    def build(*loaded: str, parts: list[Part]) -> None:
        monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
        monkeypatch.setattr(ort, "InferenceSession", _session_of([*loaded], parts))

    return build


def _open(*providers: str) -> list[str]:
    session = open_session("backbone.onnx", b"", RuntimeOptions(providers=providers))
    names: list[str] = session.get_providers()
    return names


def test_a_provider_that_loads_is_taken_with_the_cpu_behind(gpu_build):
    gpu_build(CUDA, CPU, parts=[Part(CUDA, 9), Part(CPU, 1)])
    assert _open("cuda") == [CUDA, CPU]
    assert _open("cuda", "cpu") == [CUDA, CPU]
    assert _open("cpu", "cuda") == [CPU]


def test_a_provider_in_the_build_that_does_not_load_is_an_error(gpu_build):
    gpu_build(CPU, parts=[Part(CPU, 10)])
    with pytest.raises(EngineError, match=r"cuda is in this build but did not load") as caught:
        _open("cuda")
    text = str(caught.value)
    assert "backbone.onnx" in text
    assert "it needs an NVIDIA GPU" in text
    assert f"holds {CUDA}, {CPU}" in text
    assert 'add "cpu"' in text


def test_unless_the_cpu_follows_it_and_then_that_is_logged(gpu_build, caplog):
    gpu_build(CPU, parts=[Part(CPU, 10)])
    assert _open("openvino", "cuda", "cpu") == [CPU]
    (record,) = caplog.records
    assert record.message == "provider.passed_over"
    assert [reason.split()[0] for reason in record.reasons] == ["openvino", "cuda"]
    assert 'pip install "edge-ll[device-openvino]"' in record.reasons[0]


def test_a_provider_that_takes_no_node_is_not_what_runs(gpu_build):
    gpu_build(CUDA, CPU, parts=[Part(CPU, 10)])
    with pytest.raises(EngineError, match=r"cuda took none of the graph's 10 nodes"):
        _open("cuda")
    assert _open("cuda", "cpu") == [CPU]


def test_the_nodes_on_the_provider_are_counted(gpu_build):
    gpu_build(CUDA, CPU, parts=[Part(CUDA, 5), Part(CPU, 1), Part(CUDA, 3)])
    session = open_session("step.onnx", b"", RuntimeOptions(providers=("cuda",)))
    assert runtime.placement("step", session) == ("step", CUDA, 9, 8)


def test_an_older_runtime_counts_no_nodes(gpu_build):
    gpu_build(CUDA, CPU, parts=[])
    del ort.InferenceSession.get_provider_graph_assignment_info
    session = open_session("step.onnx", b"", RuntimeOptions(providers=("cuda",)))
    assert runtime.placement("step", session) == ("step", CUDA, None, None)


def test_ort_training_needs_the_cpu_in_the_list(tmp_path):
    bundle = write_tiny_bundle(tmp_path / "b", engines=("step-graph", "ort-training"))
    with pytest.raises(EngineError, match=r'CPU only; providers: got cuda; add "cpu"'):
        open_engine(bundle, "ort-training", providers=("cuda",))


def test_the_configuration_knows_every_provider_and_option():
    assert get_args(Provider) == tuple(PROVIDERS)
    ours = {name: getattr(RuntimeConfig(), name) for name in RuntimeConfig.__struct_fields__}
    theirs = RuntimeOptions()
    assert set(ours) == {"engine", *theirs.__struct_fields__}
    for name in theirs.__struct_fields__:
        assert ours[name] == getattr(theirs, name)


# What the runtime is told


def test_by_default_one_thread_that_does_not_spin():
    settings = session_options(RuntimeOptions())
    assert (settings.intra_op_num_threads, settings.inter_op_num_threads) == (1, 1)
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    settings = session_options(RuntimeOptions(threads=3, spinning=True))
    assert settings.intra_op_num_threads == 3
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == "1"


def test_a_key_that_the_runtime_does_not_know_is_ignored():
    settings = session_options(RuntimeOptions())
    settings.add_session_config_entry("mlas.no_such_key", "1")
    assert ort.InferenceSession(backbone_graph(), settings, providers=[CPU]).get_inputs()


@pytest.mark.parametrize(
    ("system", "machine", "features", "hoards"),
    [
        ("Linux", "x86_64", {"sme"}, False),
        ("Linux", "aarch64", set(), False),
        ("Linux", "aarch64", {"asimd", "sve2"}, False),
        ("Linux", "aarch64", {"asimd", "sme"}, True),
        ("Linux", "aarch64", {"asimd", "smef32f32"}, True),
        ("Darwin", "arm64", set(), True),
        ("Darwin", "x86_64", set(), False),
        ("Windows", "ARM64", set(), True),
    ],
)
def test_kleidiai_is_turned_off_where_it_would_hoard_memory(system, machine, features, hoards):
    assert kleidiai_hoards(system, machine, frozenset(features)) is hoards


def test_the_processor_s_features_are_read_as_linux_on_arm_lists_them(tmp_path, monkeypatch):
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor\t: 0\nFeatures\t: fp asimd sme sme2\nCPU part\t: 0xd83\n")
    monkeypatch.setattr(runtime, "_CPUINFO", listed)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    settings = session_options(RuntimeOptions())
    assert settings.get_session_config_entry("mlas.disable_kleidiai") == "1"
    assert ort.InferenceSession(backbone_graph(), settings, providers=[CPU]).get_inputs()
    monkeypatch.setattr(runtime, "_CPUINFO", tmp_path / "absent")
    with pytest.raises(RuntimeError, match=r"mlas\.disable_kleidiai"):
        session_options(RuntimeOptions()).get_session_config_entry("mlas.disable_kleidiai")


# What it costs: in processes of their own, for the pool belongs to a process


def _process(code: str, folder: Path, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if key not in {"CI", _TELEMETRY}}
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "device")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_TELEMETRY = "ORT_DISABLE_TELEMETRY"
_OPEN = """
from pathlib import Path
import numpy as np
from edge_ll.bundle import Bundle
from edge_ll.engine.load import open_engine
from edge_ll.errors import EngineError
from tests.tiny_bundle import CAPACITY, LATENT, TRUST, batch_of, toy
bundle = Bundle.open(Path("toy.bundle"), TRUST)
"""
_LIMITED = """
engine = open_engine(bundle, arena_limit_bytes=1 << 20)
small, large = batch_of(*toy((0, 1), 8)), batch_of(*toy((0, 1), 60_000))
engine.step(small)
before = engine.state()
try:
    engine.step(large)
except EngineError as error:
    print(" ".join(str(error).split()))
assert engine.state().optimizer == before.optimizer
assert np.array_equal(engine.theta, before.theta)
engine.step(small)
try:
    open_engine(bundle)
except EngineError as error:
    print(error)
open_engine(bundle, arena=False).step(large)
"""
_STEADY = """
def resident():
    text = Path("/proc/self/status").read_text("ascii")
    return int(text.split("VmRSS:")[1].split()[0]) * 1024
engine = open_engine(bundle)
batches = [batch_of(*toy((0, 1, 2), n, seed=n)) for n in range(1, 41)]
def learn(steps):
    for i in range(steps):
        engine.step(batches[i % 40])
        if i % 8 == 0:
            engine.logits(batches[i % 7].latents)
            engine.latents(toy((0, 1), 1 + i % 9)[0])
learn(1000)
before = resident()
learn(6000)
print(resident() - before)
"""


def test_a_call_past_the_limit_of_the_pool_is_refused_and_changes_nothing(tmp_path):
    write_tiny_bundle(tmp_path / "toy.bundle")
    refused, other = _process(_OPEN + _LIMITED, tmp_path).splitlines()
    assert "Available memory of" in refused
    assert "limited to 1048576 bytes already, got 0" in other


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
def test_learning_takes_no_more_memory_as_it_goes_on(tmp_path):
    write_tiny_bundle(tmp_path / "toy.bundle")
    assert int(_process(_OPEN + _STEADY, tmp_path)) < 1 << 20


def test_the_runtime_tells_nobody_what_it_runs(tmp_path):
    """Stock builds from 1.29 keep what they would upload below the user's cache folder."""
    write_tiny_bundle(tmp_path / "toy.bundle")
    home = tmp_path / "home"
    home.mkdir()
    code = _OPEN + "open_engine(bundle); import os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    said = _process(code, tmp_path, HOME=str(home), XDG_CACHE_HOME=str(home / "cache"))
    assert said.strip() == "1"
    assert not list(home.rglob("*"))
    _process("import edge_ll.engine.ort_training", tmp_path, HOME=str(home))
    assert not list(home.rglob("*onnxruntime*"))
