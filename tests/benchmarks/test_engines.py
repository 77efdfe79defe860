"""The coordinator's logic on engines that answer from memory, and one tiny run for real."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.engines import machine, report
from benchmarks.engines.__main__ import bench, parse
from benchmarks.engines.cases import ENGINES, TAILS
from benchmarks.engines.coordinator import CaseResult, Plan, measure, rotated
from benchmarks.engines.installed import closure, disk_bytes
from benchmarks.engines.port import reason
from benchmarks.engines.process import ROOT, EngineFailed, WorkerProcess

PLAN = Plan(rounds=3, steps=4, warmup=1)


class Scripted:
    """An engine whose steps take a fixed time; it can fail at an action, or compute nonsense."""

    def __init__(self, log, name, *, ms=1.0, loss=2.0, later=1.5, fails=None, waited=()):
        self._log, self._name, self._ms = log, name, ms
        self._waited = iter(waited)
        self._losses, self._fails = {"open": loss, "steps": later}, fails

    def ask(self, do, **arguments):
        self._log.append((self._name, do))
        if do == self._fails:
            raise EngineFailed(f"cannot {do}")
        answer = {"loss": self._losses[do]}
        if do == "open":
            return answer | {"ready_s": 0.5}
        waited = next(self._waited, 0.0)
        ms = self._ms * (100 if waited else 1)
        return answer | {"ns": [int(ms * 1e6)] * arguments["count"], "waited_share": waited}


def scripted(**engines):
    log = []
    return {name: Scripted(log, name, **options) for name, options in engines.items()}, log


def test_every_engine_has_its_turn_in_each_round_and_another_is_first_each_time():
    workers, log = scripted(torch_fused={}, step_graph={}, ort_training={})
    measure(workers, "mlp", 16, PLAN)
    steps = [name for name, do in log if do == "steps"]
    assert steps[:3] == ["torch_fused", "step_graph", "ort_training"]
    assert steps[3:6] == ["step_graph", "ort_training", "torch_fused"]
    assert steps[6:] == ["ort_training", "torch_fused", "step_graph"]


def test_medians_are_over_all_measured_steps():
    workers, _ = scripted(torch_fused={"ms": 3.0}, step_graph={"ms": 1.5})
    result = measure(workers, "mlp", 16, PLAN)
    assert result.ms("torch_fused") == 3.0
    assert [len(times) for times in result.rounds_ms["step_graph"]] == [4, 4, 4]
    assert result.ratio("torch_fused", "step_graph") == 2.0


def test_a_ratio_is_taken_within_each_round():
    """A machine that is slow for one whole round changes medians, not their ratio."""
    result = CaseResult(
        rounds_ms={
            "torch_fused": [[2.0] * 3, [20.0] * 3, [20.0] * 3],
            "step_graph": [[1.0] * 3, [10.0] * 3, [10.0] * 3],
        }
    )
    assert result.ratio("torch_fused", "step_graph") == 2.0
    assert result.ratio("torch_fused", "onnxsim") is None


def test_torch_is_the_faster_of_its_optimizers():
    result = CaseResult(
        rounds_ms={"torch_default": [[2.0]], "torch_fused": [[3.0]], "step_graph": [[1.0]]}
    )
    row = report.times(report.Timed(results={"mlp": {16: result}}))["mlp"]["16"]
    assert (row["torch"], row["torch_over_step_graph"]) == (2.0, 2.0)
    assert row["onnxsim"] is None


def test_a_round_in_which_an_engine_waited_for_a_processor_is_repeated():
    workers, log = scripted(torch_fused={"waited": [0.0, 0.5, 0.0]}, step_graph={})
    result = measure(workers, "mlp", 16, PLAN)
    assert result.ms("torch_fused") == 1.0
    assert not result.disturbed
    assert log.count(("torch_fused", "steps")) == log.count(("step_graph", "steps")) == 4
    assert [len(rounds) for rounds in result.rounds_ms.values()] == [3, 3]


@pytest.mark.parametrize(("waited", "turns"), [([0.5] * 9, 3), ([0.0] + [0.5] * 8, 9)])
def test_a_machine_that_is_never_quiet_long_enough_is_told(waited, turns):
    workers, log = scripted(torch_fused={"waited": waited}, step_graph={})
    result = measure(workers, "mlp", 16, PLAN)
    assert result.disturbed
    assert len(result.rounds_ms["step_graph"]) == 3
    assert log.count(("step_graph", "steps")) == turns
    timed = report.Timed(results={"mlp": {16: result}})
    assert "16*" in report.times_table(timed, 2)


@pytest.mark.parametrize("action", ["open", "steps"])
def test_an_engine_that_fails_gives_its_reason_and_the_others_go_on(action):
    workers, log = scripted(step_graph={}, onnxsim={"fails": action})
    result = measure(workers, "mlp", 16, PLAN)
    assert result.reasons == {"onnxsim": f"cannot {action}"}
    assert result.ms("onnxsim") is None
    assert result.ms("step_graph") == 1.0
    assert log.count(("onnxsim", action)) == 1


def test_an_engine_with_another_loss_is_not_measured():
    workers, log = scripted(torch_fused={}, step_graph={}, onnxsim={"loss": 2.1})
    result = measure(workers, "mlp", 16, PLAN)
    assert result.ms("onnxsim") is None
    assert "first step" in result.reasons["onnxsim"]
    assert ("onnxsim", "steps") not in log


def test_an_engine_that_learns_otherwise_is_left_out_if_it_claims_the_whole_step():
    workers, _ = scripted(
        torch_fused={}, torch_default={}, step_graph={}, ort_training={"later": 1.0}
    )
    assert "step 6" in measure(workers, "mlp", 16, PLAN).reasons["ort_training"]
    assert not ENGINES["onnxsim"].whole
    workers, _ = scripted(torch_fused={}, step_graph={}, onnxsim={"later": 1.0})
    assert measure(workers, "mlp", 16, PLAN).reasons == {}


def test_a_loss_that_is_not_a_number_is_another_loss():
    workers, _ = scripted(torch_fused={}, torch_default={}, step_graph={"loss": float("nan")})
    assert "step_graph" in measure(workers, "mlp", 16, PLAN).reasons


def test_rotated():
    assert rotated(["a", "b", "c"], 4) == ["b", "c", "a"]
    assert rotated([], 1) == []


def test_the_arithmetic_of_a_step_is_a_share_of_the_same_runtimes_peak():
    timed = report.Timed(
        results={"mlp": {16: CaseResult(rounds_ms={"step_graph": [[2.0]]})}},
        gflops={"step_graph": 50.0, "torch_fused": 80.0},
    )
    share = report.gemm_share(timed, {"mlp": {"flops": {"16": 20_000_000}}})
    assert share == {"mlp": {"16": {"step_graph": 0.2}}}


def test_a_reason_stands_once():
    again = CaseResult(reasons={"onnxsim": "no rule"})
    timed = {2: report.Timed(results={"mlp": {1: again, 16: again}})}
    assert report.reasons(timed, {"mlp": {}}) == {"mlp, onnxsim": "no rule"}


def test_a_reason_is_one_line_with_the_root_of_the_error():
    error = RuntimeError("\x1b[96mcannot\x1b[0m export\nlong story")
    error.__cause__ = ValueError("no rule for Foo\nsecond line")
    assert reason(error) == "cannot export; no rule for Foo"
    assert reason(KeyError()) == "KeyError"


def test_every_tail_of_the_table_can_be_shown():
    shown = report.what_table()
    assert all(name in shown for name in TAILS)
    assert "64 x 25 x 5" in shown


def test_a_worker_whose_engine_is_not_here_says_why(tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"public_key": "00" * 32}), "utf-8")
    worker = WorkerProcess("step_graph", 1, tmp_path, Path(sys.executable))
    try:
        with pytest.raises(EngineFailed, match=r"mlp\.bundle"):
            worker.ask("open", tail="mlp", batch=1)
        with pytest.raises(EngineFailed, match="no tail is open"):
            worker.ask("steps", count=1, warmup=0)
    finally:
        worker.close()


def test_a_worker_that_cannot_even_start_says_why(tmp_path):
    worker = WorkerProcess("no_such_engine", 1, tmp_path, Path(sys.executable))
    try:
        with pytest.raises(EngineFailed, match="no_such_engine"):
            worker.ask("about")
    finally:
        worker.close()


def test_what_a_package_requires_counts_once():
    needed = closure(["pytest", "hypothesis"])
    assert {"pytest", "pluggy", "hypothesis", "sortedcontainers"} <= needed
    assert disk_bytes(["pytest", "hypothesis"]) > disk_bytes(["pytest"]) > 100_000
    assert closure(["no-such-package"]) == set()


def test_what_others_use_of_the_machine_is_what_is_not_ours():
    before = machine.CpuUse(all_s=100.0, ours_s=1.0, busy_s=10.0)
    after = machine.CpuUse(all_s=120.0, ours_s=6.0, busy_s=20.0)
    assert after.others_share(before) == pytest.approx(5 / 20)


@pytest.mark.torch
def test_a_tiny_run(tmp_path, capsys):
    """Export, processes, memory and the JSON's form, all engines that are in this environment."""
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    ort_training = pytest.importorskip("edge_ll.engine.ort_training")
    python = sys.executable
    engines = ["torch_default", "torch_fused", "step_graph"]
    if ort_training.is_available():
        engines.append("ort_training")
    options = parse(
        [
            *("--server", python, "--device", python, "--device-ort", python, "--onnxsim", python),
            *("--tails", "linear", "--batches", "4", "--threads", "1", "--no-int8"),
            *("--engines", *engines),
            *("--rounds", "2", "--steps", "3", "--memory-steps", "4", "--long-steps", "6"),
        ]
    )
    found = json.loads(json.dumps(bench(options, tmp_path)))
    row = found["linear"]["4"]
    assert found["reasons"] == {}
    assert set(row) == {"torch", *ENGINES, "torch_over_step_graph"}
    assert row["torch"] == min(row["torch_default"], row["torch_fused"])
    assert row["step_graph"] > 0
    assert all(row[name] for name in engines)
    assert row["torch_over_step_graph"] > 0
    assert row["onnxsim"] is None
    assert 0 < found["gemm_share"]["linear"]["4"]["step_graph"] < 1
    assert set(found["rss_mb"]["step_graph"]) == {"4", "6"}
    assert 20 < found["rss_mb"]["step_graph"]["6"] < 2000
    assert found["disk_mb"]["torch_fused"] > 100
    assert found["int8"] is None
    printed = capsys.readouterr().out
    assert "torch / step graph" in printed
    assert str(ROOT) not in printed
