"""Learning a recorded stream without a fleet: what the agent does, minus broker and disk."""

from __future__ import annotations

from itertools import groupby, islice
from typing import TypedDict

from edge_ll.metrics import Counts
from edge_ll_device.machine import peak_rss_bytes
from edge_ll_device.source import RecordedStream
from edge_ll_device.student import Student


class OfflineResult(TypedDict):
    """Counts per anchor group, before the stream and after each experience; then totals."""

    anchors: list[dict[str, Counts]]
    prequential: Counts
    seen: int
    learned: int
    refused: int
    drift: bool
    rss_bytes: int


def learn_stream(student: Student, stream: RecordedStream) -> OfflineResult:
    """Take the whole stream in the agent's batches."""
    size = student.bundle.manifest.learner.batch_new
    anchors = [student.learner.anchor_counts()]
    for _, samples in groupby(stream.samples(), key=lambda sample: sample.experience):
        while batch := list(islice(samples, size)):
            student.take(batch)
        anchors.append(student.learner.anchor_counts())
    tally = student.tally
    return OfflineResult(
        anchors=anchors,
        prequential=tally.prequential,
        seen=tally.seen,
        learned=tally.learned,
        refused=tally.refused,
        drift=student.drift.alarm,
        rss_bytes=peak_rss_bytes(),
    )
