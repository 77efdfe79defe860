"""Puts what the agent has to say into the outbox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from edge_ll.messages import BundleRef, Event, Report, Reported
from edge_ll_device.machine import peak_rss_bytes
from edge_ll_device.outbox import Outbox
from edge_ll_device.student import Student

Phase = Literal["baseline", "progress", "experience", "activated"]
EventKind = Literal["bundle_refused", "drift", "stream_ended"]

_DETAIL = 2000


class Reporter:
    """Numbers the reports of one session."""

    def __init__(self, outbox: Outbox, *, session: str, clock: Callable[[], float]) -> None:
        self._outbox = outbox
        self._session = session
        self._clock = clock
        self._seq = 0

    def report(self, student: Student, phase: Phase) -> None:
        """What a student saw and learned so far, in counts."""
        tally = student.tally
        self._outbox.put(
            Report(
                session=self._session,
                seq=self._seq,
                at_s=self._clock(),
                bundle=student.ref,
                phase=phase,
                experience=tally.experience,
                seen=tally.seen,
                learned=tally.learned,
                steps=student.learner.steps,
                refused=tally.refused,
                prequential=tally.prequential,
                anchors=student.learner.anchor_counts(),
                evidence=student.drift.evidence(),
                loss=tally.loss,
                rss_bytes=peak_rss_bytes(),
            )
        )
        self._seq += 1

    def event(self, kind: EventKind, detail: str) -> None:
        """Something that a person may want to know at once."""
        self._outbox.put(
            Event(session=self._session, at_s=self._clock(), kind=kind, detail=detail[:_DETAIL])
        )

    def state(
        self, bundle: BundleRef, state: Literal["pulling", "active", "refused"], detail: str = ""
    ) -> None:
        """What became of an offer."""
        self._outbox.put(
            Reported(session=self._session, bundle=bundle, state=state, detail=detail[:_DETAIL])
        )
