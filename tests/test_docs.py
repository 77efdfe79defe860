"""The documentation against the code: a wrong or missing row fails, and says what belongs there."""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest

from edge_ll import config, messages
from edge_ll.cli.main import parser as operator_parser
from edge_ll.metrics import Counts
from edge_ll_device.cli import _parser as agent_parser
from edge_ll_device.config import AgentConfig

ROOT = Path(__file__).resolve().parents[1]
PROTOCOL = (ROOT / "docs/protocol.md").read_text("utf-8")
RECIPES = (ROOT / "docs/recipes.md").read_text("utf-8")
AGENT = (ROOT / "docs/agent.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")

NOT_OURS = {"demo-out", "build", "dist", "node_modules"}
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(
        part.startswith(".") or part in NOT_OURS for part in path.relative_to(ROOT).parts[:-1]
    )
)

MESSAGES = (*messages.FROM_DEVICE, *messages.TO_DEVICE)
PARTS = (messages.BundleRef, messages.Evidence, messages.Placement)

LIMITS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}"}
PLAIN = {str: "text", int: "integer", float: "number", bool: "true or false", bytes: "bytes"}


# How a type is written in a table.


def number(value: float) -> str:
    """A limit as people write it: 2^53, 1e300, 0.5."""
    if isinstance(value, int) and value >= 2**31 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}".replace("e+", "e") if isinstance(value, float) else f"{value:,}"


def describe(hint: Any) -> str:
    """A type and its limits in words."""
    metas: list[msgspec.Meta] = []
    if get_origin(hint) is Annotated:
        hint, *metas = get_args(hint)
    arguments = get_args(hint)
    if NoneType in arguments:
        (inner,) = (item for item in arguments if item is not NoneType)
        return f"{describe(inner)}; may be left out"
    if get_origin(hint) is Literal:
        words = "one of " + ", ".join(f"`{item}`" for item in arguments)
    elif get_origin(hint) is tuple:
        words = f"list of ({describe(arguments[0])})"
    elif get_origin(hint) is dict:
        words = f"map from ({describe(arguments[0])}) to {describe(arguments[1])}"
    elif hint is Counts:
        words = "counts"
    else:
        words = PLAIN.get(hint) or f"`{hint.__name__}`"
    unit = {str: "characters", bytes: "bytes"}.get(hint, "entries")
    return ", ".join([words, *limits(metas, unit)])


def limits(metas: list[msgspec.Meta], unit: str) -> Iterator[str]:
    """What else a value must keep."""
    for meta in metas:
        yield from (
            text.format(number(bound))
            for name, text in LIMITS.items()
            if (bound := getattr(meta, name)) is not None
        )
        if meta.min_length is not None:
            yield f"at least {meta.min_length:,} {unit}"
        if meta.max_length is not None:
            yield f"at most {meta.max_length:,} {unit}"
        if meta.pattern is not None:
            yield f"`{meta.pattern}`"


def description(hint: Any) -> str:
    """What the code says a key means; empty where it says nothing."""
    metas = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((meta.description for meta in metas if meta.description), "")


def default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default
    if value is None or value in {(), ""}:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return json.dumps(list(value))
    return number(value) if isinstance(value, int | float) else str(value)


def fields(kind: type[msgspec.Struct]) -> Iterator[tuple[str, Any, str]]:
    """Each field of a struct: name, type, default."""
    hints = get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        yield field.name, hints[field.name], default(field)


def keys(kind: type[config.Section], path: str = "") -> Iterator[tuple[str, Any, str]]:
    """Each key of a configuration, the tables inside included: dotted name, type, default."""
    for name, hint, value in fields(kind):
        table = config._section_type(hint)
        if table is None:
            yield path + name, hint, value
        else:
            yield from keys(table, f"{path}{name}.")


# How a page is read.


def section(text: str, title: str) -> str:
    """What stands below a heading of level three."""
    match = re.search(rf"^### `?{title}`?$\n(.*?)(?=^#{{1,3}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"no heading ### {title}"
    return match[1]


def rows(text: str, columns: int) -> list[list[str]]:
    """The rows of all tables with so many columns, without heads and rules."""
    found = []
    for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
        if len(cells[0]) == columns:
            found += cells[2:]
    return found


def check_table(text: str, expected: list[tuple[str, Any, str]]) -> None:
    """A table ``key | type | default | meaning`` holds just these rows."""
    table = {row[0].strip("`"): row for row in rows(text, 4)}
    unknown = sorted(set(table) - {name for name, _, _ in expected})
    assert not unknown, f"rows of no key: {unknown}"
    for name, hint, value in expected:
        wanted = f"| `{name}` | {describe(hint)} | {value} | {description(hint)} |"
        assert name in table, f"missing row: {wanted}"
        assert table[name][1:3] == [describe(hint), value], f"the row should be: {wanted}"
        meaning = table[name][3]
        assert meaning, f"{name}: says nothing"
        assert description(hint).lower() in meaning.lower(), f"the row should be: {wanted}"


def examples(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


# The protocol.


def test_the_protocol_lists_every_message_and_no_other():
    table = {row[0].strip("`"): row[1:] for row in rows(PROTOCOL, 6)}
    assert table == {
        kind.__name__: [
            f"`{kind.suffix}`",
            "device to fleet" if kind in messages.FROM_DEVICE else "fleet to device",
            {"json": "JSON", "cbor": "CBOR"}[kind.encoding],
            "1",
            "yes" if kind.retain else "no",
        ]
        for kind in MESSAGES
    }


@pytest.mark.parametrize("kind", [*MESSAGES, *PARTS], ids=lambda kind: kind.__name__)
def test_the_protocol_describes_every_field(kind):
    check_table(section(PROTOCOL, kind.__name__), list(fields(kind)))


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_the_protocol_shows_an_example_of_every_message(kind):
    (example,) = examples(section(PROTOCOL, kind.__name__), "json")
    message = msgspec.convert(json.loads(example), kind)
    assert kind.decode(message.encode()) == message
    assert set(json.loads(example)) <= {name for name, _, _ in fields(kind)}


def test_the_protocol_names_the_limits():
    for limit in (messages.MAX_MESSAGE_BYTES, messages.CHUNK_BYTES):
        assert f"{limit:,} bytes" in PROTOCOL
    assert f"`{messages.ROOT}/" in PROTOCOL


# Recipes and the agent's configuration.


def test_every_key_of_a_recipe_is_described():
    recipe = pytest.importorskip("edge_ll_export.recipe")
    check_table(RECIPES, list(keys(recipe.Recipe)))


def test_every_key_of_the_agent_is_described():
    check_table(AGENT, list(keys(AgentConfig)))


def test_the_agents_examples_are_valid():
    files = [tomllib.loads(text) for text in examples(AGENT, "toml")]
    heredoc = re.search(r"^cat > agent.toml <<END\n(.*?)^END$", README, re.MULTILINE | re.DOTALL)
    assert heredoc, "README: no agent.toml"
    files.append(tomllib.loads(heredoc[1]))
    for plain in files:
        assert config.parse(plain, AgentConfig, source="example").device


# The commands.


def verbs(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Every parser that runs something."""
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield parser
    for group in groups:
        for inner in group.choices.values():
            yield from verbs(inner)


VERBS = [*verbs(operator_parser()), *verbs(agent_parser())]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.prog.replace(" ", "-"))
def test_every_verb_stands_in_the_readme_and_shows_an_example(verb):
    assert re.search(rf"{verb.prog}\b", README), f"README: nothing about {verb.prog}"
    assert (verb.epilog or "").startswith("example:")
    assert verb.prog in (verb.epilog or "")


def test_every_verb_of_the_agent_is_explained():
    for verb in verbs(agent_parser()):
        assert f"`{verb.prog}`" in AGENT


# All pages.


def slugs(text: str) -> set[str]:
    """The anchors that headings make."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text("utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        if anchor:
            assert anchor in slugs(target.read_text("utf-8")), f"{page.name}: no heading for {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_names_a_path_of_one_machine(page):
    folders = "home|root|tmp|work|usr|opt|var|etc|mnt|srv|Users"
    found = re.findall(rf"(?<![\w.:/~$}}])/(?:{folders})/\S*", page.read_text("utf-8"))
    assert not found
