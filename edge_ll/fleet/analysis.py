"""From reports to what a person wants to know: pure functions, no registry, no clock.

All take reports in the order of arrival. A device keeps its counts across restarts; where a
function looks at one session only, it says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from edge_ll import metrics
from edge_ll.messages import Report
from edge_ll.metrics import Counts, Matrix


class CurvePoint(NamedTuple):
    """Prequential accuracy of one window, which ends after ``seen`` samples of the session."""

    seen: int
    accuracy: float
    counts: Counts


class EvidencePoint(NamedTuple):
    """State of one drift detector after ``n`` scores, in natural logarithms."""

    n: int
    now: float
    peak: float
    threshold: float


def accuracy_matrix(
    reports: Iterable[Report], groups: Iterable[str], *, digest: str | None = None
) -> Matrix:
    """The accuracy matrix R of the newest run of a device.

    A run is begun on a bundle by a report of phase ``baseline`` (row 0); row k is the report of
    phase ``experience`` with experience k. It goes on across restarts of the agent, whose counts
    are kept. Where a row came twice the first one counts. The matrix ends before the first row
    that is missing, so rows and experiences agree.

    Args:
        reports: One device's reports in the order of arrival.
        groups: Names of the anchor groups in the manifest's order: the columns.
        digest: Look only at runs on this bundle.

    Returns:
        At most one row per group; empty where no run is known.
    """
    names = list(groups)
    rows = [
        report
        for report in reports
        if report.phase in {"baseline", "experience"} and digest in {None, report.bundle.digest}
    ]
    found: dict[int, Report] = {}
    sessions: set[str] = set()
    earlier: set[str] = set()
    for row in rows:
        if row.session in earlier:
            continue  # late news from a run that is over
        first = found.get(0)
        if row.phase == "baseline" and (first is None or row.session != first.session):
            earlier |= sessions
            sessions, found = set(), {0: row}
        elif first and row.experience and row.bundle.digest == first.bundle.digest:
            found.setdefault(row.experience, row)
        sessions.add(row.session)
    matrix: list[list[Counts]] = []
    while len(matrix) < len(names) and len(matrix) in found:
        anchors = found[len(matrix)].anchors
        matrix.append([anchors.get(name, Counts(0, 0)) for name in names])
    return matrix


def device_forgetting(
    reports: Iterable[Report], groups: Iterable[str], *, digest: str | None = None
) -> float | None:
    """Forgetting (Chaudhry et al., ECCV 2018) of the newest run, as a share of 1.

    Returns:
        None before the first experience, or where a group was not measured.
    """
    matrix = accuracy_matrix(reports, groups, digest=digest)
    if len(matrix) < 2:
        return None
    value = metrics.forgetting(matrix)
    return None if math.isnan(value) else value


def drift_alarms_due(report: Report) -> list[str]:
    """The signals whose evidence has reached its threshold since the detector's start."""
    return sorted(
        signal for signal, state in report.evidence.items() if state.peak >= state.threshold
    )


def prequential_curve(reports: Sequence[Report], *, min_n: int = 1) -> list[CurvePoint]:
    """Test-then-train accuracy in windows, from the newest session's cumulative counts.

    A lost report only makes a window longer (Gama et al., Machine Learning 90, 2013, on
    prequential evaluation).

    Args:
        reports: One device's reports.
        min_n: A window is closed by the first report that brings it to this many predictions.
    """
    points: list[CurvePoint] = []
    before = Counts(0, 0)
    for report in newest_session(reports):
        now = report.prequential
        correct, n = now.correct - before.correct, now.n - before.n
        if n < 0 or not 0 <= correct <= n:
            # The counters went back: they started anew, and so does the window.
            before = now
        elif n >= max(1, min_n):
            window = Counts(correct, n)
            points.append(CurvePoint(report.seen, window.accuracy, window))
            before = now
    return points


def evidence_curve(reports: Sequence[Report], signal: str) -> list[EvidencePoint]:
    """How the evidence of one signal grew over the newest session."""
    return [
        EvidencePoint(state.n, state.now, state.peak, state.threshold)
        for report in newest_session(reports)
        if (state := report.evidence.get(signal)) is not None
    ]


def newest_session(reports: Sequence[Report]) -> list[Report]:
    """The reports of the session that was heard of last, each once, by sequence number."""
    if not reports:
        return []
    session = reports[-1].session
    unique = {report.seq: report for report in reports if report.session == session}
    return [unique[seq] for seq in sorted(unique)]
