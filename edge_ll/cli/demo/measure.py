"""From a run to figures: ``summary.json`` and the record behind the report."""

from __future__ import annotations

from typing import Any

import msgspec

from edge_ll import metrics
from edge_ll.cli.demo.lifecycle import Run
from edge_ll.cli.demo.record import DemoRecord, DeviceRecord, MergeRecord, Moment
from edge_ll.errors import DataError
from edge_ll.fleet.analysis import accuracy_matrix
from edge_ll.messages import Report
from edge_ll.metrics import Counts

SIGNAL = "novelty"


def measure(run: Run, seconds: float) -> DemoRecord:
    """Compute every figure from the counts that the devices reported."""
    groups = tuple(run.bundle.manifest.anchor_groups)
    labels = run.bundle.manifest.labels
    devices = tuple(_device(run, name, number, groups) for number, name in enumerate(run.reports))
    return DemoRecord(
        name=run.trained.recipe.name,
        groups=groups,
        group_labels={
            group: tuple(labels[c] for c in classes)
            for group, classes in run.bundle.manifest.anchor_groups.items()
        },
        summary=_summary(run, devices, seconds),
        devices=devices,
        merge=_merge(run),
        steps=tuple(run.steps),
    )


def _device(run: Run, name: str, number: int, groups: tuple[str, ...]) -> DeviceRecord:
    reports = run.reports[name]
    local = [r for r in reports if r.bundle.digest == run.bundle.digest]
    matrix = tuple(tuple(row) for row in accuracy_matrix(local, groups))
    if len(matrix) != len(groups):
        raise DataError(
            f"{name}: expected a report before learning and after each of {len(groups) - 1} "
            f"experiences, got {len(matrix)} of {len(groups)}"
        )
    naive = tuple(
        tuple(msgspec.convert(row[group], Counts) for group in groups)
        for row in _rows(run.naive[number])
    )
    return DeviceRecord(
        name=name,
        drifts_at=run.streams[number].drifts_at,
        moments=tuple(_moment(report) for report in local),
        experience_ends=tuple(r.seen for r in local if r.phase == "experience"),
        matrix=matrix,
        naive_matrix=naive,
        forgetting=metrics.forgetting(matrix),
        naive_forgetting=metrics.forgetting(naive),
        alarms=run.alarms[name],
        threshold=local[-1].evidence[SIGNAL].threshold,
        rss_bytes=max(report.rss_bytes for report in reports),
        final=_last(run, reports).anchors,
    )


def _last(run: Run, reports: list[Report]) -> Report:
    """The last report on the bundle that was rolled out, or on the first where none was."""
    digest = run.merge.bundle.digest if run.merge.bundle else run.bundle.digest
    return [report for report in reports if report.bundle.digest == digest][-1]


def _rows(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = outcome["anchors"]
    return rows


def _moment(report: Report) -> Moment:
    evidence = report.evidence[SIGNAL]
    return Moment(
        seen=report.seen,
        prequential=report.prequential,
        anchors=report.anchors,
        log_evidence=evidence.now,
        watched=evidence.n,
    )


def _merge(run: Run) -> MergeRecord:
    merge = run.merge
    return MergeRecord(
        accepted=merge.accepted,
        reasons=merge.reasons,
        base_acc=merge.base_acc,
        single_acc=merge.single_accs,
        merged_acc=float("nan") if merge.merged_acc is None else merge.merged_acc,
        left_out=merge.left_out,
        version=merge.bundle.version if merge.bundle else None,
    )


def _summary(run: Run, devices: tuple[DeviceRecord, ...], seconds: float) -> dict[str, object]:
    trained = run.trained.metrics
    old = _groups(run)[0]
    before = [dict(zip(_groups(run), device.matrix[0], strict=True)) for device in devices]
    learned = [dict(zip(_groups(run), device.matrix[-1], strict=True)) for device in devices]
    return {
        "devices": len(devices),
        "seconds": round(seconds, 1),
        "teacher_acc": round(trained.teacher_acc, 4),
        "student_acc": round(trained.student_acc, 4),
        "student_acc_without_teacher": round(trained.student_acc_without_teacher, 4),
        "acc_before": _old_new(before, old),
        "acc_learned": _old_new(learned, old),
        "acc_after": _old_new([device.final for device in devices], old),
        "forgetting": _mean([device.forgetting for device in devices]),
        "naive_forgetting": _mean([device.naive_forgetting for device in devices]),
        "drift_alarms": {device.name: device.alarms for device in devices},
        "merged_acc": _rounded(run.merge.merged_acc),
        "best_single_acc": _rounded(run.merge.best_single_acc),
        "merge_accepted": run.merge.accepted,
        "bundle_bytes": run.bundle.size_bytes,
        "agent_rss_mb": round(max(device.rss_bytes for device in devices) / 2**20, 1),
        "agent_engine": run.engine,
        "agents_without_torch": run.torch_free,
        "broker": run.broker,
    }


def _groups(run: Run) -> tuple[str, ...]:
    return tuple(run.bundle.manifest.anchor_groups)


def _old_new(devices: list[dict[str, Counts]], first: str) -> dict[str, float]:
    """Accuracy on the first group and on all others, from the counts of all devices together."""
    old = metrics.total(counts[first] for counts in devices)
    new = metrics.total(
        item for counts in devices for group, item in counts.items() if group != first
    )
    return {"old": round(old.accuracy, 4), "new": round(new.accuracy, 4)}


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
