import msgspec
import pytest

pytest.importorskip("sqlalchemy", reason="the fleet extra is not installed")

from edge_ll.fleet.analysis import (
    accuracy_matrix,
    device_forgetting,
    drift_alarms_due,
    evidence_curve,
    prequential_curve,
)
from edge_ll.metrics import Counts

pytestmark = pytest.mark.fleet

GROUPS = ("old", "new", "newer")


def cells(old, new, newer):
    return {"old": (old, 10), "new": (new, 10), "newer": (newer, 10)}


@pytest.fixture
def run(make_report):
    """Baseline, two experiences; old falls from 9 (10 in between) to 7, new from 8 to 6."""
    return [
        make_report(0, phase="baseline", anchors=cells(9, 0, 0)),
        make_report(1, phase="progress", experience=1, anchors=cells(1, 1, 1)),
        make_report(2, phase="experience", experience=1, anchors=cells(10, 8, 0)),
        make_report(3, phase="experience", experience=2, anchors=cells(7, 6, 9)),
    ]


def test_the_matrix_has_a_row_per_experience_in_the_order_of_the_groups(run):
    matrix = accuracy_matrix(run, GROUPS)
    assert [[cell.correct for cell in row] for row in matrix] == [[9, 0, 0], [10, 8, 0], [7, 6, 9]]
    reordered = accuracy_matrix(run, ["newer", "old"])
    assert [[cell.correct for cell in row] for row in reordered] == [[0, 9], [0, 10]]


def test_forgetting_by_hand(run):
    # old: max(0.9, 1.0) - 0.7 = 0.3; new: 0.8 - 0.6 = 0.2; mean 0.25
    assert device_forgetting(run, GROUPS) == pytest.approx(0.25)
    assert device_forgetting(run[:1], GROUPS) is None
    assert device_forgetting([], GROUPS) is None


def test_the_first_of_two_equal_rows_counts(run, make_report):
    again = make_report(9, phase="experience", experience=1, anchors=cells(0, 0, 0))
    assert accuracy_matrix([*run, again], GROUPS) == accuracy_matrix(run, GROUPS)


def test_a_lost_row_ends_the_matrix(run):
    assert len(accuracy_matrix([run[0], run[3]], GROUPS)) == 1
    assert accuracy_matrix(run[1:], GROUPS) == []


def test_runs_are_not_mixed(run, make_report):
    later = [
        make_report(0, phase="baseline", anchors=cells(5, 5, 5), session="f" * 16),
        make_report(9, phase="experience", experience=2, anchors=cells(0, 0, 0)),
    ]
    matrix = accuracy_matrix([*run, *later], GROUPS)
    assert [[cell.correct for cell in row] for row in matrix] == [[5, 5, 5]]
    other = make_report(0, phase="baseline", anchors=cells(4, 4, 4), digest="b" * 64)
    assert accuracy_matrix([*run, other], GROUPS, digest="a" * 64) == accuracy_matrix(run, GROUPS)
    assert accuracy_matrix([*run, other], GROUPS) == accuracy_matrix([*run], GROUPS)
    anew = make_report(
        0, phase="baseline", anchors=cells(4, 4, 4), digest="b" * 64, session="e" * 16
    )
    assert len(accuracy_matrix([*run, anew], GROUPS)) == 1


def test_a_run_goes_on_after_a_restart(run, make_report):
    *begun, last = run
    restarted = msgspec.structs.replace(last, session="e" * 16, seq=0)
    assert accuracy_matrix([*begun, restarted], GROUPS) == accuracy_matrix(run, GROUPS)


def test_a_group_that_was_not_measured_is_empty_not_wrong(make_report):
    rows = [
        make_report(0, phase="baseline", anchors={}),
        make_report(1, phase="experience", experience=1, anchors={"new": (5, 10)}),
    ]
    assert accuracy_matrix(rows, GROUPS)[0] == [Counts(0, 0)] * 3
    assert device_forgetting(rows, GROUPS) is None


def test_an_alarm_is_due_when_the_peak_reaches_the_threshold(make_report):
    assert drift_alarms_due(make_report(peak=6.8)) == []
    assert drift_alarms_due(make_report(peak=6.9)) == ["loss"]


def test_the_prequential_curve_is_made_of_differences(make_report):
    rows = [
        make_report(0, seen=10, prequential=(5, 10)),
        make_report(2, seen=30, prequential=(20, 30)),
        make_report(1, seen=20, prequential=(12, 20)),
        make_report(2, seen=30, prequential=(20, 30)),
    ]
    curve = prequential_curve(rows)
    assert [(point.seen, point.accuracy) for point in curve] == [(10, 0.5), (20, 0.7), (30, 0.8)]
    wide = prequential_curve(rows, min_n=20)
    assert [(point.seen, point.counts) for point in wide] == [(20, Counts(12, 20))]


def test_counters_that_went_back_begin_a_new_window(make_report):
    rows = [
        make_report(0, seen=10, prequential=(5, 10)),
        make_report(1, seen=12, prequential=(1, 2)),
        make_report(2, seen=14, prequential=(3, 4)),
    ]
    assert [point.accuracy for point in prequential_curve(rows)] == [0.5, 1.0]


def test_the_evidence_curve_is_of_the_newest_session(make_report):
    rows = [
        make_report(0, peak=9.0, session="f" * 16),
        make_report(0, seen=5, peak=1.0),
        make_report(1, seen=9, peak=2.0),
    ]
    assert [(point.n, point.peak) for point in evidence_curve(rows, "loss")] == [(5, 1.0), (9, 2.0)]
    assert evidence_curve(rows, "absent") == []
    assert evidence_curve([], "loss") == []
