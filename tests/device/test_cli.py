"""``edge-ll-agent`` as a process: answers on standard output, one clear line where it cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_ll import logs
from edge_ll.bundle import BACKBONE
from edge_ll.manifest import TensorSpec, TokenizerSpec
from edge_ll_device import cli
from tests.tiny_bundle import (
    BASE,
    LABELS,
    LATENT,
    SHAPE,
    SIGNER,
    Graph,
    toy,
    write_stream,
    write_tiny_bundle,
)
from tests.tiny_tokenizer import TINY_TOKENIZER


class Place:
    """A folder with a bundle, its key, inputs and a stream."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_tiny_bundle(folder / "toy.bundle")
        (folder / "key.pub").write_text(SIGNER.public_key.hex() + "\n", encoding="ascii")
        self.x, self.y = toy(BASE, 6)
        np.save(folder / "x.npy", self.x)
        write_stream(folder / "s.npz", toy((2,), 40), toy((3,), 40, seed=1))

    def args(self, verb: str, *more: str) -> list[str]:
        return [verb, "toy.bundle", "--trust", "key.pub", *more]

    def config(self, **changes: str) -> str:
        lines = {
            "device": '"hub"',
            "state_dir": f'"{self.folder / "state"}"',
            "trusted_keys": f'["{SIGNER.public_key.hex()}"]',
            "broker": '{ url = "mqtt://127.0.0.1:1" }',
            **changes,
        }
        text = "\n".join(f"{key} = {value}" for key, value in lines.items())
        (self.folder / "agent.toml").write_text(text, encoding="utf-8")
        return "agent.toml"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def run(place, monkeypatch, capsys):
    """The command in this process: quick; ``process`` below is the real thing."""
    monkeypatch.chdir(place.folder)
    monkeypatch.setattr(logs, "configure", lambda **_: None)

    def run(*args: str) -> tuple[int, str, str]:
        try:
            code = cli.main(args)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def _process(place: Place, *args: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_ll_device.cli", *args],
        cwd=place.folder,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def test_predict_as_a_process(place):
    done = _process(place, *place.args("predict", "--input", "x.npy", "--json"))
    assert (done.returncode, done.stderr) == (0, "")
    answers = json.loads(done.stdout)["predictions"]
    assert [answer["label"] for answer in answers] == [LABELS[c] for c in place.y]
    assert all(0.5 < answer["confidence"] <= 1 for answer in answers)


def test_learn_as_a_process(place):
    done = _process(place, *place.args("learn", "--stream", "s.npz", "--json"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["seen"], result["learned"], result["refused"]) == (80, 80, 0)
    assert len(result["anchors"]) == 3
    correct, n = result["anchors"][2]["base"]
    assert correct / n > 0.8


def test_an_error_as_a_process(place):
    done = _process(place, "predict", "absent", "--trust", "key.pub", "--input", "x.npy")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_predict_for_people(run, place):
    code, out, _ = run(*place.args("predict", "--input", "x.npy"))
    assert code == 0
    assert [line.split()[1] for line in out.splitlines()] == [LABELS[c] for c in place.y]


def test_predict_a_text(run, place):
    pytest.importorskip("tokenizers")
    g = Graph()
    g.op("Mul", g.op("Cast", "x", to=1), g.const(0.3), out="latents")
    ids, latents = ("int64", ("batch", LATENT)), ("float32", ("batch", LATENT))
    write_tiny_bundle(
        place.folder / "text.bundle",
        files={
            BACKBONE: g.model({"x": ids}, {"latents": latents}),
            "tokenizer.json": TINY_TOKENIZER,
        },
        input=TensorSpec(shape=(LATENT,), dtype="int64"),
        tokenizer=TokenizerSpec(file="tokenizer.json", max_length=LATENT),
    )
    texts = ["--text", "play a song", "--text", "turn the light on"]
    code, out, err = run("predict", "text.bundle", "--trust", "key.pub", *texts, "--json")
    assert code == 0, err
    answers = json.loads(out)["predictions"]
    assert [answer["label"] in LABELS for answer in answers] == [True, True]
    assert answers[0] != answers[1]


def test_predict_takes_text_or_samples(run, place):
    code, _, err = run(*place.args("predict", "--text", "play"))
    assert code == 2
    assert "toy takes no text; it takes float32" in err
    assert run(*place.args("predict"))[0] == 2
    assert run(*place.args("predict", "--text", "play", "--input", "x.npy"))[0] == 2


def test_learn_for_people(run, place):
    code, out, _ = run(*place.args("learn", "--stream", "s.npz"))
    assert code == 0
    assert out.count("after experience") == 3
    assert "seen 80, learned 80, refused 0" in out
    assert "drift alarm: no" in out


def test_learning_naively_forgets(run, place):
    base = {}
    for name, more in (("replay", ()), ("naive", ("--no-replay",))):
        _, out, _ = run(*place.args("learn", "--stream", "s.npz", "--json", *more))
        base[name] = json.loads(out)["anchors"][-1]["base"][0]
    assert base["replay"] > base["naive"]


def test_the_same_seed_gives_the_same_answer(run, place):
    def learned(seed: str) -> dict:
        result = json.loads(
            run(*place.args("learn", "--stream", "s.npz", "--json", "--seed", seed))[1]
        )
        del result["rss_bytes"]
        return result

    assert learned("3") == learned("3")


def _write(place: Place, name: str, data: object) -> None:
    path = place.folder / name
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        np.save(path, data)


PREDICT = ("predict", "toy.bundle", "--trust", "key.pub", "--input")
LEARN = ("learn", "toy.bundle", "--trust", "key.pub", "--stream")
BAD = {
    "no bundle": (["predict", "absent", "--trust", "key.pub", "--input", "x.npy"], None),
    "a folder": (["predict", ".", "--trust", "key.pub", "--input", "x.npy"], None),
    "no bundle at all": (["predict", "x.npy", "--trust", "key.pub", "--input", "x.npy"], None),
    "no key": (["predict", "toy.bundle", "--trust", "absent", "--input", "x.npy"], None),
    "no key at all": (["predict", "toy.bundle", "--trust", "x.npy", "--input", "x.npy"], None),
    "no input": ([*PREDICT, "absent"], None),
    "input a stream": ([*PREDICT, "s.npz"], None),
    "input text": (["bad"], b"hello"),
    "input a zip head": (["bad"], b"PK\x03\x04 hello"),
    "input cut": (["bad"], b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'"),
    "input empty file": (["bad"], b""),
    "input of one sample": (["bad"], np.zeros(SHAPE, np.float32)),
    "input without axes": (["bad"], np.float32(1)),
    "input of another shape": (["bad"], np.zeros((2, 7), np.float32)),
    "input of another dtype": (["bad"], np.zeros((2, *SHAPE))),
    "input not finite": (["bad"], np.full((2, *SHAPE), np.nan, np.float32)),
    "no stream": ([*LEARN, "absent"], None),
    "stream an array": ([*LEARN, "x.npy"], None),
    "engine not held": (
        [
            "learn",
            "toy.bundle",
            "--trust",
            "key.pub",
            "--stream",
            "s.npz",
            "--engine",
            "ort-training",
        ],
        None,
    ),
    "seed below zero": (
        [*LEARN, "s.npz", "--seed", "-1"],
        None,
    ),
    "no threads": (
        [*LEARN, "s.npz", "--threads", "-1"],
        None,
    ),
    "config absent": (["status", "--config", "absent"], None),
    "config no toml": (["status", "--config", "x.npy"], None),
    "run without config": (["run", "--config", "absent"], None),
}


@pytest.mark.parametrize(("args", "data"), BAD.values(), ids=BAD)
def test_what_cannot_be_done_is_said_in_one_line(run, place, args, data):
    if args == ["bad"]:
        _write(place, "bad.npy", data)
        args = [*PREDICT, "bad.npy"]
    code, out, err = run(*args)
    assert code == 2
    assert out == ""
    assert "error: " in err
    assert "Traceback" not in err


def test_no_samples_are_no_predictions(run, place):
    _write(place, "none.npy", np.zeros((0, *SHAPE), np.float32))
    code, out, _ = run(*place.args("predict", "--input", "none.npy", "--json"))
    assert (code, json.loads(out)) == (0, {"predictions": []})


def test_a_bad_config_reports_every_problem(run, place):
    config = place.config(
        device='"no spaces allowed"', trusted_keys="[]", stat_dir='"x"', report_every_samples="0"
    )
    code, _, err = run("status", "--config", config)
    assert code == 2
    assert "4 problems" in err
    for words in ("device", "trusted_keys", "report_every_samples", "did you mean 'state_dir'"):
        assert words in err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"broker": "{}"}, "broker.url: missing"),
        ({"broker": '{ url = "mqtt://x", keepalive_s = 0 }'}, "broker.keepalive_s"),
        ({"runtime": '{ engine = "ort" }'}, "runtime.engine"),
        ({"runtime": "{ threads = 0 }"}, "runtime.threads"),
        ({"learning": "{ buffer_entries = 0 }"}, "learning.buffer_entries"),
        ({"learning": "{ seed = -1 }"}, "learning.seed"),
        ({"stream": "{ interval_s = -1.0 }"}, "stream.file: missing"),
    ],
)
def test_config_problems_name_the_key(run, place, changes, words):
    code, _, err = run("status", "--config", place.config(**changes))
    assert code == 2
    assert words in err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"broker": '{ url = "http://x" }'}, "http"),
        ({"trusted_keys": '["zz"]'}, "hexadecimal"),
        ({"trusted_keys": '["00"]'}, "Ed25519"),
        ({"state_dir": '"key.pub"'}, "key.pub"),
        ({"stream": '{ file = "absent.npz" }'}, "absent.npz"),
    ],
)
def test_run_says_what_stops_it(place, changes, words):
    if "stream" in changes:  # a bundle already runs, so the stream is opened at once
        from edge_ll_device.store import Store
        from tests.tiny_bundle import TRUST

        store = Store(place.folder / "state2", TRUST)
        bundle = write_tiny_bundle(place.folder / "b")
        store.bundle_path(bundle.digest).write_bytes((place.folder / "b").read_bytes())
        store.set_current(bundle.digest)
        changes = {**changes, "state_dir": f'"{place.folder / "state2"}"'}
    done = _process(place, "run", "--config", place.config(**changes), timeout_s=20)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "ort-training"], ["holds no engine 'ort-training'", "step-graph"]),
        (["--provider", "cuda"], ["cuda is not in this build", "CPUExecutionProvider", '"cpu"']),
    ],
)
def test_what_cannot_run_here_is_said_in_one_line(run, place, monkeypatch, options, words):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    code, out, err = run(*place.args("predict", "--input", "x.npy", *options))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err


def test_the_next_provider_is_taken_where_the_first_is_not_here(run, place, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    more = ("--provider", "cuda", "--provider", "cpu", "--json")
    code, out, _ = run(*place.args("predict", "--input", "x.npy", *more))
    assert code == 0
    assert len(json.loads(out)["predictions"]) == 6


def test_status_before_the_first_run(run, place):
    code, out, err = run("status", "--config", place.config(state_dir='"nowhere"'), "--json")
    assert (code, out) == (2, "")
    assert "has not run yet" in err


def test_status_for_people_and_machines(run, place):
    from edge_ll_device.store import Store
    from tests.tiny_bundle import TRUST

    status = {"device": "hub", "bundle": None, "classes": ["a", "b"], "anchors": {"base": [3, 4]}}
    where = [{"graph": "tail", "placed": 9}, {"graph": "step", "placed": 90}]
    status |= {"rate": 0.123456, "placements": where}
    Store(place.folder / "state", TRUST).save_status(status)
    code, out, _ = run("status", "--config", place.config(), "--json")
    assert code == 0
    assert json.loads(out)["anchors"] == {"base": [3, 4]}
    code, out, _ = run("status", "--config", place.config())
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["bundle"] == "-"
    assert lines["classes"] == "a b"
    assert lines["rate"] == "0.1235"
    assert lines["placements"] == "graph=tail, placed=9; graph=step, placed=90"


def test_help_and_version(run):
    code, out, _ = run("--help")
    assert code == 0
    for verb in ("run", "status", "predict", "learn"):
        assert verb in out
    assert run("--version")[0] == 0
    assert run()[0] == 2


def test_the_agent_stops_on_a_signal_and_leaves_its_status(place):
    """No broker listens: it starts all the same, and ends in order when it is told to."""
    config = place.config(state_dir=f'"{place.folder / "running"}"')
    options = ("--log-format", "json")
    agent = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "edge_ll_device.cli",
            *options,
            "run",
            "--config",
            config,
        ],
        cwd=place.folder,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert agent.stderr.readline(), "it says that no broker is there"
        agent.send_signal(signal.SIGTERM)
        _, err = agent.communicate(timeout=20)
    finally:
        agent.kill()
    assert agent.returncode == 0, err
    assert "Traceback" not in err
    assert (place.folder / "running" / "status.json").exists()
