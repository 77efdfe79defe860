from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from edge_ll.config import load, parse
from edge_ll.errors import ConfigError
from edge_ll_export.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "export" / "recipes"


def _raw():
    return tomllib.loads((RECIPES / "digits.toml").read_text())


def _problems(raw):
    with pytest.raises(ConfigError) as caught:
        parse(raw, Recipe, source="recipe")
    return caught.value.problems


@pytest.mark.parametrize("name", ["digits", "fsdd", "cifar10", "clinc150"])
def test_the_shipped_recipes_load_and_open_with_their_command(name):
    path = RECIPES / f"{name}.toml"
    recipe = load(path, Recipe)
    assert recipe.name == name
    assert path.read_text().splitlines()[0] == (
        f"# Run it:  edge-ll train export/recipes/{name}.toml"
    )
    assert len(recipe.classes.new) == recipe.classes.capacity - len(recipe.classes.base)


def test_every_problem_is_reported_at_once_with_a_suggestion():
    raw = _raw()
    raw["teacher"]["widht"] = 3
    raw["student"]["fit"]["lr"] = -1.0
    raw["student"]["tail"]["kind"] = "pointwize"
    raw["split"]["test"] = 0.9
    raw["classes"]["labels"] = ["zero"]
    problems = _problems(raw)
    assert len(problems) == 5
    text = "\n".join(problems)
    assert "did you mean 'width'" in text
    assert "did you mean 'pointwise'" in text
    assert "student.fit.lr" in text
    assert "sum below 1, got 1.35" in text
    assert "expected 10 (the capacity), got 1" in text


@pytest.mark.parametrize(
    ("table", "key", "value", "says"),
    [
        ("classes", "base", [0, 1, 12], "classes [12] do not fit a capacity of 10"),
        ("classes", "experiences", [[5, 6]], "classes [5] stand twice"),
        ("classes", "experiences", [[]], "at least one class"),
        ("classes", "labels", ["same"] * 10, "each name may stand once"),
        ("split", "traffic", 0.65, "must leave something to train on"),
        ("learner", "optimizer", "adam", "did you mean 'adamw'"),
    ],
)
def test_a_rule_across_fields_names_its_table(table, key, value, says):
    raw = _raw()
    raw[table][key] = value
    (problem,) = _problems(raw)
    assert problem.startswith(table)
    assert says in problem


def test_tail_and_backbone_must_fit():
    raw = _raw()
    raw["student"]["tail"] = {"kind": "linear", "hidden": [8]}
    assert "a linear tail has no hidden layers" in _problems(raw)[0]
    raw["student"]["tail"] = {"kind": "mlp"}
    assert "a mlp tail needs hidden layers" in _problems(raw)[0]
    raw = _raw()
    raw["student"]["backbone"]["kind"] = "dscnn"
    assert "'digits' holds image samples and needs 'conv' or" in (problem := _problems(raw)[0])
    assert problem.endswith("got 'dscnn'")
    raw = _raw()
    raw["student"]["tail"]["kind"] = "pointwise"
    assert "pointwise" in _problems(raw)[0]


@pytest.mark.parametrize(
    ("backbone", "says"),
    [
        ({"kind": "conv", "latent_channels": 4}, "channels: missing; a conv backbone needs it"),
        ({"kind": "resnet", "channels": [8]}, "latent_channels: missing"),
        (
            {"kind": "resnet", "channels": [8], "latent_channels": 4, "width": 2.0},
            "width: a resnet backbone has none; it takes channels, latent_channels, stride, pool",
        ),
        ({"kind": "minilm", "channels": [8]}, "channels: a minilm backbone has none"),
        ({"kind": "minilm", "layers": 7}, "student.backbone.layers"),
        ({"kind": "mobilnet"}, "did you mean 'mobilenet'"),
    ],
)
def test_a_backbone_takes_the_keys_of_its_kind(backbone, says):
    raw = _raw()
    raw["student"]["backbone"] = backbone
    (problem,) = _problems(raw)
    assert problem.startswith("student.backbone")
    assert says in problem


FILE = {"path": "mine.npz", "kind": "window", "shape": [50, 3]}


def _own(backbone, **changes):
    raw = _raw()
    raw["student"]["backbone"] = backbone
    table = {key: value for key, value in (FILE | changes).items() if value is not None}
    return raw | {"dataset": "file", "file": table}


@pytest.mark.parametrize(
    ("backbone", "changes"),
    [
        ({"kind": "tcn", "channels": [8], "latent_channels": 4}, {}),
        ({"kind": "mlp", "channels": [8], "latent_channels": 4}, {}),
        (
            {"kind": "mobilenet", "channels": [8], "latent_channels": 4, "width": 0.5},
            {"kind": "image", "shape": [3, 32, 48]},
        ),
        (
            {"kind": "dscnn", "channels": [8], "latent_channels": 4, "pool": True},
            {"kind": "waveform", "shape": [16000], "sample_rate_hz": 16000},
        ),
        ({"kind": "minilm", "layers": 2}, {"kind": "text", "shape": [24]}),
    ],
)
def test_own_data_fits_every_kind_of_backbone(backbone, changes):
    recipe = parse(_own(backbone, **changes), Recipe, source="recipe")
    assert recipe.file.kind == changes.get("kind", "window")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shape": [50]}, "expected [T, C] for kind 'window', got [50]"),
        ({"kind": "image", "shape": [32, 32]}, "expected [C, H, W]"),
        ({"sample_rate_hz": 8000}, "waveforms need it and nothing else has it"),
        ({"kind": "waveform", "shape": [8000]}, "waveforms need it"),
        ({"kind": "text", "shape": [600]}, "3 to 512 token ids, got 600"),
        ({"kind": "sound"}, "known: image, text, waveform, window"),
        ({"path": ""}, "file.path"),
        ({"kind": "waveform", "shape": [800], "sample_rate_hz": 800}, "holds waveform samples"),
    ],
)
def test_what_own_data_lacks_is_said(changes, says):
    backbone = {"kind": "tcn", "channels": [8], "latent_channels": 4}
    (problem,) = _problems(_own(backbone, **changes))
    assert says in problem


def test_the_table_of_own_data_comes_with_its_data_set():
    raw = _own({"kind": "tcn", "channels": [8], "latent_channels": 4})
    assert "no other has it; got dataset 'digits'" in _problems(raw | {"dataset": "digits"})[0]
    del raw["file"]
    assert 'the data set "file" needs the table [file]' in _problems(raw)[0]


@pytest.mark.parametrize("kind", ["pointwise", "separable"])
def test_a_convolutional_tail_needs_a_latent_with_positions(kind):
    raw = _own({"kind": "tcn", "channels": [8], "latent_channels": 4, "pool": False})
    raw["student"]["tail"] = {"kind": kind, "hidden": [8]}
    assert parse(raw, Recipe, source="recipe").student.backbone.latent_axes == "CT"
    raw["student"]["backbone"]["pool"] = True
    assert f"a {kind} tail needs a latent with axes CT or CHW" in _problems(raw)[0]


def test_a_transformer_tail_needs_tokens_and_two_widths():
    raw = _own({"kind": "tcn", "channels": [8], "latent_channels": 4, "pool": False})
    raw["student"]["tail"] = {"kind": "transformer", "hidden": [8, 16]}
    assert parse(raw, Recipe, source="recipe").student.tail.hidden == (8, 16)
    raw["student"]["backbone"]["pool"] = True
    assert "a transformer tail needs a latent with axes CT" in _problems(raw)[0]
    raw["student"]["backbone"]["pool"] = False
    for hidden in ([8], [9, 16], [8, 16, 8]):
        raw["student"]["tail"]["hidden"] = hidden
        assert any("a multiple of 4" in problem for problem in _problems(raw))
