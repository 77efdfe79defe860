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


@pytest.mark.parametrize("name", ["digits", "fsdd"])
def test_the_shipped_recipes_load_and_open_with_their_command(name):
    path = RECIPES / f"{name}.toml"
    recipe = load(path, Recipe)
    assert recipe.name == name
    assert path.read_text().splitlines()[0] == (
        f"# Run it:  edge-ll train export/recipes/{name}.toml"
    )
    assert recipe.classes.new == (6, 7, 8, 9)


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
    assert "needs 'conv', got 'dscnn'" in _problems(raw)[0]
    raw = _raw()
    raw["student"]["tail"]["kind"] = "pointwise"
    assert "pointwise" in _problems(raw)[0]
