"""``edge-ll`` by hand: train, export, inspect, verify; help, exit codes, missing extras."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge_ll.cli.main import main, parser
from edge_ll.manifest import Provenance
from edge_ll.trust import Signer
from tests.tiny_bundle import SIGNER, write_tiny_bundle

ROOT = Path(__file__).parents[2]


def verbs():
    actions = [a for a in parser()._actions if hasattr(a, "choices") and a.choices]
    return next(a.choices for a in actions if "demo" in a.choices)


@pytest.mark.parametrize("name", sorted(verbs()))
def test_every_verb_has_an_example(name):
    assert "edge-ll " in verbs()[name].epilog
    assert verbs()[name].epilog.startswith("example:")


def test_version_and_unknown_verbs(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main(["fly"])
    assert ended.value.code == 2


def test_a_missing_extra_names_the_pip_command(monkeypatch, capsys):
    monkeypatch.setattr("edge_ll.cli.extras.find_spec", lambda _: None)
    assert main(["train", "recipe.toml", "--out", "x"]) == 2
    assert 'pip install "edge-ll[export]"' in capsys.readouterr().err
    assert main(["demo"]) == 2
    assert 'pip install "edge-ll[fleet]"' in capsys.readouterr().err


def test_inspect_without_a_bundle(tmp_path, capsys):
    (tmp_path / "key.pub").write_text(Signer.generate().public_key.hex())
    key = ["--trust", str(tmp_path / "key.pub")]
    assert main(["inspect", str(tmp_path / "absent"), *key]) == 2
    assert "no such file" in capsys.readouterr().err


INT8 = {
    "backbone_int8_acc_change": -0.0125,
    "backbone_int8_acc_n": 80.0,
    "backbone_int8_speedup": 1.5,
}
FIGURES = "int8 changes the accuracy by -0.0125 on 80 samples, is 1.50 times as fast at batch 1"


@pytest.mark.parametrize(
    ("precision", "metrics", "row"),
    [
        ("float32", {}, "float32"),
        ("int8", INT8, f"int8: {FIGURES}"),
        ("float32", INT8, f"float32; int8 was tried and left out: {FIGURES}"),
    ],
)
def test_inspect_tells_the_precision_of_the_backbone(tmp_path, capsys, precision, metrics, row):
    provenance = Provenance(recipe="r", created_at_s=0.0, metrics=metrics)
    write_tiny_bundle(tmp_path / "b", backbone_precision=precision, provenance=provenance)
    (tmp_path / "key.pub").write_text(SIGNER.public_key.hex())
    assert main(["inspect", str(tmp_path / "b"), "--trust", str(tmp_path / "key.pub")]) == 0
    assert f"backbone     {row}\n" in capsys.readouterr().out


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A bundle made by the verbs, from a recipe that trains for a moment only."""
    pytest.importorskip("torch", reason="the export extra is not installed")
    folder = tmp_path_factory.mktemp("exported")
    text = (ROOT / "export/recipes/digits.toml").read_text("utf-8")
    (folder / "recipe.toml").write_text(re.sub(r"epochs = \d+", "epochs = 1", text), "utf-8")
    run = ["--out", str(folder / "run"), "--json"]
    assert main(["train", str(folder / "recipe.toml"), *run]) == 0
    assert (
        main([
            "export", str(folder / "run"), "--out", str(folder / "d.bundle"),
            "--key", str(folder / "key.pem"), "--json",
        ])
        == 0
    )  # fmt: skip
    return folder


@pytest.mark.torch
def test_train_and_export_leave_what_they_say(exported):
    assert {p.name for p in (exported / "run").iterdir()} == {
        "recipe.toml", "student.npz", "metrics.json",
    }  # fmt: skip
    assert (exported / "key.pem.pub").exists()


@pytest.mark.torch
def test_inspect(exported, capsys):
    bundle = [str(exported / "d.bundle"), "--trust", str(exported / "key.pem.pub")]
    assert main(["inspect", *bundle]) == 0
    text = capsys.readouterr().out
    assert "digits version 1" in text
    assert "step-graph, ort-training" in text
    assert main(["inspect", *bundle, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"][9] == "nine"


@pytest.mark.torch
@pytest.mark.ort_training
def test_verify_compares_every_engine_with_torch(exported, capsys):
    bundle = [str(exported / "d.bundle"), "--trust", str(exported / "key.pem.pub")]
    assert main(["verify", *bundle, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [engine["engine"] for engine in told["engines"]] == ["step-graph", "ort-training"]
    for engine in told["engines"]:
        assert engine["steps"] == 100
        for name in ("logits", "losses", "gradients", "theta"):
            assert engine[name]["absolute"] < 1e-4
            assert engine[name]["relative"] < 1e-4


@pytest.mark.torch
def test_verify_refuses_a_damaged_bundle_and_a_strange_key(exported, tmp_path, capsys):
    damaged = tmp_path / "damaged.bundle"
    data = bytearray((exported / "d.bundle").read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    trust = ["--trust", str(exported / "key.pem.pub")]
    assert main(["verify", str(damaged), *trust]) == 2
    assert "damaged.bundle: the bundle is damaged" in capsys.readouterr().err
    (tmp_path / "other.pub").write_text("00" * 32)
    other = ["--trust", str(tmp_path / "other.pub")]
    assert main(["verify", str(exported / "d.bundle"), *other]) == 2
    assert "unknown key" in capsys.readouterr().err


@pytest.mark.torch
def test_a_broken_recipe_reports_everything_at_once(tmp_path, capsys):
    pytest.importorskip("torch", reason="the export extra is not installed")
    text = (ROOT / "export/recipes/digits.toml").read_text("utf-8")
    text = text.replace("temperature", "temprature").replace("capacity = 10", "capacity = 9")
    (tmp_path / "broken.toml").write_text(text, "utf-8")
    assert main(["train", str(tmp_path / "broken.toml"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "did you mean 'temperature'" in said
    assert "capacity" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.torch
def test_export_of_a_folder_that_is_no_run(tmp_path, capsys):
    pytest.importorskip("torch", reason="the export extra is not installed")
    arguments = ["export", str(tmp_path), "--out", "x", "--key", str(tmp_path / "k.pem")]
    assert main(arguments) == 2
    assert "recipe.toml" in capsys.readouterr().err


def test_help_needs_no_extra():
    """The command starts where only the core is installed: no import of a heavy package."""
    code = (
        "import sys; from edge_ll.cli.main import parser; parser().format_help();"
        "heavy = {'torch', 'onnx', 'sqlalchemy', 'rich', 'matplotlib', 'onnxruntime', 'amqtt'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
