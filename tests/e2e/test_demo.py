"""The whole lifecycle, as a user runs it: processes, a real broker, real data."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("sqlalchemy", reason="the fleet extra is not installed")

pytestmark = [pytest.mark.e2e, pytest.mark.torch, pytest.mark.fleet]

ROOT = Path(__file__).parents[2]
DEVICE_PYTHON = ROOT / ".venv-device/bin/python"
KEYS = {
    "devices", "seconds", "teacher_acc", "student_acc", "student_acc_without_teacher",
    "acc_before", "acc_after", "forgetting", "naive_forgetting", "drift_alarms", "merged_acc",
    "best_single_acc", "bundle_bytes", "agent_rss_mb", "agent_engine", "broker",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _device_environment():
    if not DEVICE_PYTHON.exists():
        pytest.skip(f"the agents' environment is missing; run: make venv-device ({DEVICE_PYTHON})")


def demo(out, *options):
    return subprocess.run(
        [sys.executable, "-m", "edge_ll.cli.main", "demo", "--out", out, "--json", *options],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    result = demo(out)
    assert result.returncode == 0, result.stderr
    return out, json.loads(result.stdout)


@pytest.fixture
def quick_recipe(tmp_path):
    """The digits recipe with a tenth of the training: the way is tested, not the accuracy."""
    text = (ROOT / "export/recipes/digits.toml").read_text("utf-8")
    text = re.sub(r"epochs = \d+", "epochs = 6", text)
    path = tmp_path / "quick.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_it_learns_keeps_and_reports(finished):
    out, summary = finished
    assert set(summary) >= KEYS
    assert summary == json.loads((out / "summary.json").read_text("utf-8"))
    assert summary["devices"] == 3
    assert summary["acc_before"]["new"] == 0.0
    assert summary["acc_after"]["old"] >= 0.90
    assert summary["acc_after"]["new"] >= 0.90
    assert summary["forgetting"] <= 0.05
    assert summary["forgetting"] < summary["naive_forgetting"] / 2
    assert summary["drift_alarms"] == {"hub-1": 0, "hub-2": 0, "hub-3": 1}
    assert summary["merged_acc"] >= summary["best_single_acc"] - 0.02
    assert summary["agent_rss_mb"] <= 110
    assert summary["agents_without_torch"] is True
    assert summary["agent_engine"].startswith("step-graph")
    assert summary["bundle_bytes"] == (out / "digits-1.bundle").stat().st_size


def test_the_report_is_one_file_of_its_own(finished):
    page = (finished[0] / "report.html").read_text("utf-8")
    assert "hub-3" in page
    assert page.count("<svg") >= 8
    assert not re.search(r'(?:src|href)="https?:', page)


def test_the_agents_end_in_peace(finished):
    for number in (1, 2, 3):
        lines = (finished[0] / f"logs/hub-{number}.log").read_text("utf-8")
        assert "event=agent.stopped" in lines
        assert "Traceback" not in lines
        assert lines.count("event=bundle.activated") == 2  # the exported bundle, the merged one


def test_the_fleets_files_can_be_looked_at_afterwards(finished):
    out, _ = finished
    fleet = [sys.executable, "-m", "edge_ll.cli.main", "devices", "--data", out / "fleet"]
    run = subprocess.run(
        [*fleet, "--tenant", "demo", "--json"], capture_output=True, text=True, check=True
    )
    assert {row["device"] for row in json.loads(run.stdout)} == {"hub-1", "hub-2", "hub-3"}
    status = subprocess.run(
        [DEVICE_PYTHON, "-m", "edge_ll_device.cli", "status", "--json",
         "--config", out / "agents/hub-1.toml"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = json.loads(status.stdout)
    assert told["bundle"] == "digits 2"
    assert told["waiting_reports"] == 0


def test_a_broker_that_goes_away_is_survived(tmp_path, quick_recipe, embedded_broker):
    """The broker dies as the agents pull the bundle, and again while they learn."""
    log = tmp_path / "out/logs/hub-1.log"
    deaths = []

    def murder():
        for event in ("event=agent.started", "event=bundle.activated"):
            while not (log.exists() and event in log.read_text("utf-8")):
                time.sleep(0.02)
            embedded_broker.kill()
            time.sleep(0.5)
            embedded_broker.restart()
            deaths.append(event)

    murderer = threading.Thread(target=murder, daemon=True)
    murderer.start()
    result = demo(tmp_path / "out", "--recipe", quick_recipe, "--broker", embedded_broker.url)
    assert result.returncode == 0, result.stderr
    assert len(deaths) == 2
    summary = json.loads(result.stdout)
    assert summary["broker"].endswith(f":{embedded_broker.port}")
    for number in (1, 2, 3):
        device = tmp_path / f"out/agents/hub-{number}"
        assert json.loads((device / "status.json").read_text("utf-8"))["tally"]["refused"] == 0


@pytest.mark.mosquitto
def test_mosquitto_and_onnxruntime_training(tmp_path, quick_recipe, mosquitto_broker):
    """Somebody's broker, the other engine; the demo leaves nothing retained behind."""
    from edge_ll.transport.mqtt import MqttTransport

    result = demo(
        tmp_path / "out", "--recipe", quick_recipe, "--broker", mosquitto_broker.url,
        "--engine", "ort-training", "--device-python", sys.executable,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["agent_engine"].startswith("ort-training (onnxruntime 1.19.2)")
    left = []
    with MqttTransport(mosquitto_broker.url, client_id="looking") as transport:
        transport.subscribe("el/#", left.append)
        transport.connect(5)
        time.sleep(0.5)
    assert left == []


def test_without_the_agents_environment_it_says_how_to_make_it(tmp_path):
    result = demo(tmp_path, "--device-python", tmp_path / "absent")
    assert result.returncode == 2
    assert "make venv-device" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.chromium
def test_the_report_opens_in_a_browser(finished, tmp_path):
    import shutil

    binary = shutil.which("chromium")
    if binary is None:
        if os.environ.get("CI") == "true":
            pytest.fail("in CI this may not be skipped: chromium is not installed")
        pytest.skip("chromium is not installed")
    picture = tmp_path / "report.png"
    subprocess.run(
        [binary, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}",
         "--window-size=1200,4300", (finished[0] / "report.html").as_uri()],
        check=True, capture_output=True, timeout=90,
    )  # fmt: skip
    assert picture.stat().st_size > 100_000  # a blank page is far smaller
