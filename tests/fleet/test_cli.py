import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("sqlalchemy", reason="the fleet extra is not installed")

from edge_ll.cli.fleet_verbs import add_devices, add_fleet, add_push
from edge_ll.errors import ProtocolError, TrustError
from edge_ll.fleet.registry import DATABASE, Registry
from edge_ll.messages import BundleRef, Reported

pytestmark = pytest.mark.fleet


def run(*arguments):
    parser = argparse.ArgumentParser("edge-ll")
    verbs = parser.add_subparsers(required=True)
    for add in (add_fleet, add_push, add_devices):
        add(verbs)
    args = parser.parse_args([str(item) for item in arguments])
    return args.run(args)


@pytest.fixture
def public_key(tmp_path, signer):
    path = tmp_path / "signer.key.pub"
    path.write_text(signer.public_key.hex() + "\n")
    return path


@pytest.mark.parametrize("verb", [("fleet",), ("fleet", "serve"), ("push",), ("devices",)])
def test_help_ends_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*verb, "--help")
    assert caught.value.code == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-2] == "example:"


def test_push_registers_and_says_so(tmp_path, make_bundle, public_key, capsys):
    data = tmp_path / "data"
    push = ("push", make_bundle(), "--data", data, "--trust", public_key)
    assert run(*push) == 0
    assert "toy version 1" in capsys.readouterr().out
    assert run(*push, "--json") == 0
    ref = json.loads(capsys.readouterr().out)
    assert Registry(data / DATABASE).desired("default").digest == ref["digest"]
    assert (data / "bundles" / f"{ref['digest']}.bundle").exists()


def test_push_refuses_a_wrong_key_and_a_wrong_tenant(tmp_path, make_bundle, public_key):
    bundle, data = make_bundle(), tmp_path / "data"
    with pytest.raises(TrustError, match="absent"):
        run("push", bundle, "--data", data, "--trust", tmp_path / "absent")
    with pytest.raises(ProtocolError, match="tenant"):
        run("push", bundle, "--data", data, "--trust", public_key, "--tenant", "+")


def test_devices_without_any_teaches_and_creates_nothing(tmp_path, capsys):
    assert run("devices", "--data", tmp_path / "data") == 0
    assert "edge-ll fleet serve --data" in capsys.readouterr().out
    assert run("devices", "--data", tmp_path / "data", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []
    assert not (tmp_path / "data").exists()


def test_devices_shows_what_they_learned_and_forgot(
    tmp_path, make_bundle, public_key, make_birth, make_report, capsys
):
    data = tmp_path / "data"
    run("push", make_bundle(), "--data", data, "--trust", public_key, "--json")
    digest = json.loads(capsys.readouterr().out)["digest"]
    registry = Registry(data / DATABASE)
    registry.record_birth("default", "hub", make_birth())
    ref = BundleRef(name="toy", version=1, digest=digest)
    registry.record_reported(
        "default", "hub", Reported(session="0" * 16, bundle=ref, state="active")
    )
    rows = [
        make_report(0, phase="baseline", anchors={"old": (10, 10), "new": (0, 10)}, digest=digest),
        make_report(
            1,
            phase="experience",
            experience=1,
            anchors={"old": (9, 10), "new": (8, 10)},
            digest=digest,
            seen=40,
            peak=7.0,
        ),
        make_report(2, digest=digest, seen=50),
    ]
    for report in rows:
        registry.record_report("default", "hub", report, report.encode())
    for signal_name in ("loss", "\x1b[31mred"):
        registry.raise_alarm(
            "default", "hub", signal_name, report=rows[1], evidence=rows[1].evidence["loss"]
        )
    assert run("devices", "--data", data, "--json") == 0
    (device,) = json.loads(capsys.readouterr().out)
    assert device["seen"] == 50
    assert (device["old"], device["new"]) == ([9, 10], [8, 10])
    assert device["forgetting"] == pytest.approx(0.1)
    assert run("devices", "--data", data) == 0
    table = capsys.readouterr().out
    for text in ("hub", "yes", "v1", "active", "50 / 50", "90.0 % of 10", "10.0 %", "loss"):
        assert text in table
    assert "\x1b" not in table


SERVE = """
import sys, argparse
from edge_ll.cli.fleet_verbs import add_fleet
parser = argparse.ArgumentParser()
add_fleet(parser.add_subparsers())
args = parser.parse_args(sys.argv[1:])
sys.exit(args.run(args))
"""


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_cleanly(tmp_path, embedded_broker, ending):
    url = f"mqtt://127.0.0.1:{embedded_broker.port}"
    arguments = ["fleet", "serve", "--data", str(tmp_path / "data"), "--broker", url]
    command = [sys.executable, "-c", SERVE, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not (tmp_path / "data" / DATABASE).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, ending)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors.decode()
    assert b"Traceback" not in errors
