from __future__ import annotations

import json
import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_ll import logs


def record(event="bundle.activated", *, exc_info=None, level=logging.INFO, **fields):
    entry = logging.LogRecord("edge_ll.x", level, __file__, 1, event, None, exc_info)
    entry.created = 0.0625
    vars(entry).update(fields)
    return entry


def error_info():
    try:
        int("broken")
    except ValueError:
        return sys.exc_info()


def test_text_is_one_line_of_fields():
    line = logs.LineFormatter("text").format(record(name_of="kws", version=3, size=1.5))
    assert line == (
        "at=1970-01-01T00:00:00.062+00:00 level=info logger=edge_ll.x event=bundle.activated "
        "name_of=kws version=3 size=1.5"
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain", "plain"),
        ("", '""'),
        ("two words", '"two words"'),
        ('a"b', r'"a\"b"'),
        ("a\nb", r'"a\nb"'),
        ("a=b", '"a=b"'),
        (None, "None"),
        ({"a": 1}, "\"{'a': 1}\""),
    ],
)
def test_text_quotes_what_would_be_ambiguous(value, expected):
    assert logs.LineFormatter("text").format(record(field=value)).endswith(f" field={expected}")


def test_json_holds_the_same_fields():
    entry = record("drift", level=logging.WARNING, evidence=2.5, path=object)
    fields = json.loads(logs.LineFormatter("json").format(entry))
    assert fields == {
        "at": "1970-01-01T00:00:00.062+00:00",
        "level": "warning",
        "logger": "edge_ll.x",
        "event": "drift",
        "evidence": 2.5,
        "path": "<class 'object'>",
    }


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_traceback_stays_on_the_line(style):
    line = logs.LineFormatter(style).format(record(exc_info=error_info()))
    assert line.splitlines() == [line]
    assert "ValueError: invalid literal" in line
    assert "Traceback" in line


@given(st.text(), st.sampled_from(["text", "json"]))
def test_whatever_is_logged_stays_one_printable_line(text, style):
    line = logs.LineFormatter(style).format(record(detail=text, event=text or "e"))
    assert line.splitlines() == [line]
    assert "\x1b" not in line


@given(st.text(min_size=1))
def test_the_value_of_a_json_field_survives(text):
    assert json.loads(logs.LineFormatter("json").format(record(detail=text)))["detail"] == text


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield root
    root.handlers[:], level = before
    root.setLevel(level)


@pytest.mark.parametrize("level", logs.LEVELS)
def test_configure_sends_from_its_level_up_to_standard_error(root_logger, capsys, level):
    logs.configure(level=level, style="json")
    logs.configure(level=level, style="json")  # again: no line twice
    for name in logs.LEVELS:
        logging.getLogger("edge_ll.test").log(
            getattr(logging, name.upper()), "said", extra={"n": 1}
        )
    out, err = capsys.readouterr()
    heard = [json.loads(line)["level"] for line in err.splitlines()]
    assert heard == list(logs.LEVELS[logs.LEVELS.index(level) :])
    assert not out


def test_configure_writes_text_unless_told(root_logger, capsys):
    logs.configure()
    logging.getLogger("edge_ll.test").info("said", extra={"who": "me"})
    assert capsys.readouterr().err.endswith("level=info logger=edge_ll.test event=said who=me\n")
