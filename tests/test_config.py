from __future__ import annotations

import re
from typing import Annotated, Literal

import pytest
from msgspec import Meta, field

from edge_ll import config
from edge_ll.errors import ConfigError


class Optimizer(config.Section, frozen=True, kw_only=True):
    name: Literal["adamw", "sgd"] = "adamw"
    rate: Annotated[float, Meta(gt=0)] = 0.1


class Span(config.Section, frozen=True, kw_only=True):
    low: int
    high: int

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")


class Recipe(config.Section, frozen=True, kw_only=True):
    epochs: Annotated[int, Meta(ge=1)]
    name: str = "unnamed"
    optimizer: Optimizer = Optimizer()
    span: Span | None = None
    marked: Annotated[Optimizer, Meta(description="the same, described")] = Optimizer()
    spans: dict[str, Span] = field(default_factory=dict)
    steps: list[Span] = field(default_factory=list)
    stages: tuple[Span, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()


def problems(raw, kind=Recipe) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config.parse(raw, kind, source="recipe.toml")
    return caught.value.problems


def test_a_whole_file_is_read_into_frozen_types(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        """
        epochs = 3
        sizes = [1, 2]
        [optimizer]
        name = "sgd"
        rate = 1
        [span]
        low = 1
        high = 2
        [marked]
        rate = 0.5
        [spans.wide]
        low = 0
        high = 9
        [[steps]]
        low = 3
        high = 3
        [[stages]]
        low = 4
        high = 5
        [weights]
        a = 2
        """,
        encoding="utf-8",
    )
    recipe = config.load(path, Recipe)
    assert recipe == Recipe(
        epochs=3,
        sizes=(1, 2),
        optimizer=Optimizer(name="sgd", rate=1.0),
        span=Span(low=1, high=2),
        marked=Optimizer(rate=0.5),
        spans={"wide": Span(low=0, high=9)},
        steps=[Span(low=3, high=3)],
        stages=(Span(low=4, high=5),),
        weights={"a": 2.0},
    )
    assert isinstance(recipe.stages, tuple)
    with pytest.raises(AttributeError):
        recipe.epochs = 4


def test_every_problem_is_reported_at_once_with_its_path():
    found = problems(
        {
            "epoch": 3,
            "name": 7,
            "optimizer": {"name": "sgdd", "rate": -1},
            "span": {"low": 1},
            "spans": {"wide": {"low": 2, "high": 1}, "far": {"low": "x", "high": 1}},
            "steps": [{"low": 0, "high": 1}, {"hgih": 2, "low": 1, "high": 2}],
            "stages": [{"low": True, "high": 1}],
            "sizes": [1, "two"],
        }
    )
    expected = [
        "epoch: unknown key; did you mean 'epochs'?",
        "epochs: missing; expected int",
        "name: expected `str`, got `int`, got 7",
        "optimizer.name: invalid enum value 'sgdd'; did you mean 'sgd'?",
        "optimizer.rate: expected `float` > 0.0, got -1",
        "span.high: missing; expected int",
        "spans.wide: low 2 is above high 1",
        "spans.far.low: expected `int`, got `str`, got 'x'",
        "steps[1].hgih: unknown key; did you mean 'high'?",
        "stages[0].low: expected `int`, got `bool`, got True",
        "sizes: expected `int`, got `str` - at `$[1]`, got [1, 'two']",
    ]
    assert sorted(found) == sorted(expected)


def test_the_error_counts_its_problems_and_names_its_source():
    two = str(ConfigError("a.toml", ["x: bad", "y: worse"]))
    assert two == "a.toml: 2 problems\n  - x: bad\n  - y: worse"
    assert str(ConfigError("a.toml", ["x: bad"])).startswith("a.toml: 1 problem\n")


def test_an_unknown_key_far_from_all_names_lists_them():
    (found,) = problems({"low": 1, "high": 2, "zzzz": 3}, Span)
    assert found == "zzzz: unknown key; known: high, low"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"epochs": 1, "optimizer": 5}, "optimizer: expected a table, got int"),
        ({"epochs": 1, "span": [1]}, "span: expected a table, got list"),
        ({"epochs": 1, "steps": [5]}, "steps[0]: expected a table, got int"),
        ({"epochs": 1, "spans": {"a": "b"}}, "spans.a: expected a table, got str"),
    ],
)
def test_a_value_where_a_table_belongs(raw, expected):
    assert problems(raw) == (expected,)


@pytest.mark.parametrize(
    ("key", "value"), [("spans", 3), ("steps", {"low": 1}), ("stages", "x"), ("weights", [1])]
)
def test_a_wrong_container(key, value):
    (found,) = problems({"epochs": 1, key: value})
    assert found.startswith(f"{key}: expected `")


def test_a_rule_across_fields_at_the_top():
    assert problems({"low": 2, "high": 1}, Span) == ("the whole: low 2 is above high 1",)


def test_a_rule_across_fields_waits_until_the_fields_are_right():
    (found,) = problems({"low": 2, "high": "1"}, Span)
    assert found.startswith("high: ")


def test_what_is_missing_is_described_without_its_limits():
    (found,) = problems({})
    assert found == "epochs: missing; expected int"


def test_a_missing_table_is_described():
    class Outer(config.Section, frozen=True, kw_only=True):
        inner: Span | None
        choice: Literal["a"]

    Outer.__annotations__ = {"inner": Span | None, "choice": Literal["a"]}
    first, second = problems({}, Outer)
    assert re.fullmatch(r"inner: missing; expected .*Span \| None", first)
    assert second.startswith("choice: missing; expected ")
    assert "Literal" in second


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"epochs = ", "is not valid TOML"),
        (b"epochs = 1\nepochs = 2", "is not valid TOML"),
        (b"name = '\xff'", "is not valid TOML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, content, expected):
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        config.load(path, Recipe)
    assert caught.value.source == str(path)


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path, Recipe)
