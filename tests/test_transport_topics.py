from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_ll.errors import TransportError
from edge_ll.transport import topics

# The examples of MQTT 3.1.1, section 4.7.
CASES = [
    ("sport/tennis/player1/#", "sport/tennis/player1", True),
    ("sport/tennis/player1/#", "sport/tennis/player1/ranking", True),
    ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
    ("sport/tennis/player1/#", "sport/tennis/player2", False),
    ("sport/#", "sport", True),
    ("#", "anything/at/all", True),
    ("sport/tennis/+", "sport/tennis/player1", True),
    ("sport/tennis/+", "sport/tennis/player1/ranking", False),
    ("sport/+", "sport", False),
    ("sport/+", "sport/", True),
    ("+/tennis/#", "sport/tennis", True),
    ("sport/+/player1", "sport/tennis/player1", True),
    ("+/+", "/finance", True),
    ("/+", "/finance", True),
    ("+", "/finance", False),
    ("#", "$SYS/monitor/Clients", False),
    ("+/monitor/Clients", "$SYS/monitor/Clients", False),
    ("$SYS/#", "$SYS/monitor/Clients", True),
    ("$SYS/monitor/+", "$SYS/monitor/Clients", True),
    ("ACCOUNTS", "Accounts", False),
    ("/finance", "finance", False),
]


@pytest.mark.parametrize(("topic_filter", "topic", "expected"), CASES)
def test_the_examples_of_the_standard(topic_filter, topic, expected):
    assert topics.matches(topic_filter, topic) is expected


@pytest.mark.parametrize("bad", ["sport/tennis#", "sport/tennis/#/ranking", "sport+", "+a/b", "##"])
def test_misplaced_wildcards_are_refused(bad):
    with pytest.raises(TransportError, match="filter"):
        topics.check_filter(bad)


@pytest.mark.parametrize("good", ["#", "+", "sport/tennis/#", "+/tennis/#", "/", "a//b", "$SYS/#"])
def test_good_filters_pass(good):
    topics.check_filter(good)


@pytest.mark.parametrize("bad", ["", "a\0", "é" * 129, "\ud800", "a/+/b", "#"])
def test_bad_topics_are_refused(bad):
    with pytest.raises(TransportError, match="topic"):
        topics.check_topic(bad)


def test_the_longest_topic_passes():
    topics.check_topic("é" * 128)


levels = st.lists(st.text("ab$é", max_size=3), min_size=1, max_size=5)


def slow_match(wanted: list[str], levels: list[str]) -> bool:
    """The standard's words, one level at a time."""
    if not wanted:
        return not levels
    if wanted == ["#"]:
        return True
    if not levels:
        return False
    return wanted[0] in {"+", levels[0]} and slow_match(wanted[1:], levels[1:])


@given(levels, st.data())
def test_a_filter_made_from_a_topic_matches_it(topic_levels, data):
    wanted = [data.draw(st.sampled_from([level, "+"])) for level in topic_levels]
    if data.draw(st.booleans()):
        wanted = [*wanted[: data.draw(st.integers(0, len(wanted)))], "#"]
    hidden = topic_levels[0].startswith("$") and wanted[0] in {"+", "#"}
    assert topics.matches("/".join(wanted), "/".join(topic_levels)) is not hidden


@given(
    st.lists(st.sampled_from(["a", "b", "", "+"]), min_size=1, max_size=5),
    st.booleans(),
    st.lists(st.sampled_from(["a", "b", ""]), min_size=1, max_size=5),
)
def test_matching_agrees_with_the_standard_read_slowly(wanted, open_end, topic_levels):
    wanted = [*wanted, "#"] if open_end else wanted
    expected = slow_match(wanted, topic_levels)
    assert topics.matches("/".join(wanted), "/".join(topic_levels)) is expected
