"""The fleet at a glance: one summary per device, from the registry alone."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from edge_ll.fleet.analysis import device_forgetting
from edge_ll.fleet.registry import Registry
from edge_ll.fleet.rows import DeviceRow
from edge_ll.manifest import Manifest
from edge_ll.messages import Report
from edge_ll.metrics import Counts, total


class DeviceSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a person wants to know of a device first.

    Attributes:
        old: Counts on the anchor groups that pre-training covered; None where not measured.
        new: Counts on the other anchor groups.
        forgetting: Of the newest run, as a share of 1.
        alarms: Signals that raised a drift alarm, each once.
        last_seen_s: Seconds since the epoch.
    """

    device: str
    online: bool
    bundle_version: int | None
    state: str | None
    seen: int
    learned: int
    old: Counts | None
    new: Counts | None
    forgetting: float | None
    alarms: tuple[str, ...]
    last_seen_s: float


def overview(registry: Registry, tenant: str) -> list[DeviceSummary]:
    """A summary of each of a tenant's devices, by name."""
    manifests = {row.digest: row.manifest() for row in registry.bundles()}
    return [_summary(registry, row, manifests) for row in registry.devices(tenant)]


def _summary(registry: Registry, row: DeviceRow, manifests: dict[str, Manifest]) -> DeviceSummary:
    reports = [item.report() for item in registry.reports(row.tenant, row.device)]
    last = reports[-1] if reports else None
    measured = next((report for report in reversed(reports) if report.anchors), None)
    manifest = manifests.get(measured.bundle.digest) if measured else None
    old = new = forgetting = None
    if measured is not None and manifest is not None:
        base = set(manifest.base_classes)
        groups = manifest.anchor_groups
        old = _counts(measured, (name for name in groups if set(groups[name]) <= base))
        new = _counts(measured, (name for name in groups if not set(groups[name]) <= base))
        forgetting = device_forgetting(reports, groups)
    alarms = registry.alarms(row.tenant, row.device)
    return DeviceSummary(
        device=row.device,
        online=row.online,
        bundle_version=row.bundle_version,
        state=row.state,
        seen=last.seen if last else 0,
        learned=last.learned if last else 0,
        old=old,
        new=new,
        forgetting=forgetting,
        alarms=tuple(sorted({alarm.signal for alarm in alarms})),
        last_seen_s=row.last_seen_s,
    )


def _counts(report: Report, groups: Iterable[str]) -> Counts | None:
    counts = total(report.anchors[name] for name in groups if name in report.anchors)
    return counts if counts.n else None
