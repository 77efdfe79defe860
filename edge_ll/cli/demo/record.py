"""What a demo run measured: the source of ``summary.json`` and ``report.html``."""

from __future__ import annotations

from dataclasses import dataclass

from edge_ll.metrics import Counts


@dataclass(frozen=True)
class Moment:
    """One report of a device, reduced to what is drawn.

    Attributes:
        seen: Samples seen so far: the horizontal axis.
        prequential: Cumulative counts of predictions made before the label was learned.
        anchors: Counts per anchor group, measured at this moment.
        log_evidence: Natural logarithm of the drift evidence now.
        watched: Samples that the drift detector has taken so far.
    """

    seen: int
    prequential: Counts
    anchors: dict[str, Counts]
    log_evidence: float
    watched: int


@dataclass(frozen=True)
class DeviceRecord:
    """One device over the run.

    Attributes:
        name: The device.
        drifts_at: Samples seen when its inputs were turned; None where they never were.
        moments: Its reports in order, before it moved to the merged bundle.
        experience_ends: Samples seen at the end of each experience.
        matrix: Accuracy matrix in counts: row 0 before learning, row i after experience i;
            columns are the anchor groups.
        naive_matrix: The same for the same stream learned without replay.
        forgetting: Chaudhry forgetting from ``matrix``.
        naive_forgetting: The same from ``naive_matrix``.
        alarms: Drift alarms that the fleet raised.
        threshold: Natural logarithm of the evidence at which an alarm is due.
        rss_bytes: The most memory its agent held.
        final: Counts per anchor group after it moved to the last bundle.
    """

    name: str
    drifts_at: int | None
    moments: tuple[Moment, ...]
    experience_ends: tuple[int, ...]
    matrix: tuple[tuple[Counts, ...], ...]
    naive_matrix: tuple[tuple[Counts, ...], ...]
    forgetting: float
    naive_forgetting: float
    alarms: int
    threshold: float
    rss_bytes: int
    final: dict[str, Counts]


@dataclass(frozen=True)
class MergeRecord:
    """What the fleet made of the devices' updates; accuracies on the server's hold-out.

    Attributes:
        accepted: Whether the gate let the merged tail pass.
        reasons: The gate's reasons, in words.
        base_acc: Of the bundle that the devices started from.
        single_acc: Of each device's own tail.
        merged_acc: Of the merged tail.
        left_out: Device -> why its update was not merged.
        version: Of the bundle that was published; None where none was.
    """

    accepted: bool
    reasons: tuple[str, ...]
    base_acc: float
    single_acc: dict[str, float]
    merged_acc: float
    left_out: dict[str, str]
    version: int | None


@dataclass(frozen=True)
class DemoRecord:
    """The whole run.

    Attributes:
        name: Of the recipe.
        groups: Anchor groups, in the order in which they are taught.
        group_labels: The names of the classes in each group.
        summary: What ``summary.json`` holds.
        devices: One record each.
        merge: The merge round.
        steps: What was done: (stage, seconds).
    """

    name: str
    groups: tuple[str, ...]
    group_labels: dict[str, tuple[str, ...]]
    summary: dict[str, object]
    devices: tuple[DeviceRecord, ...]
    merge: MergeRecord
    steps: tuple[tuple[str, float], ...]
