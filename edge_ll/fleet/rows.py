"""What the registry hands out: one frozen type per table, free of any database library."""

from __future__ import annotations

import msgspec

from edge_ll.manifest import Manifest
from edge_ll.messages import BundleRef, Report


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all rows; times (``_s``) are seconds since the epoch on the server's clock."""


class DeviceRow(Row, frozen=True, kw_only=True):
    """The last that is known of a device.

    ``bundle_*`` is what runs there; ``state`` and ``state_digest`` what became of the last offer.
    """

    tenant: str
    device: str
    session: str | None
    online: bool
    engine: str | None
    provider: str | None
    runtime: str | None
    agent_version: str | None
    machine: str | None
    rss_bytes: int
    bundle_name: str | None
    bundle_version: int | None
    bundle_digest: str | None
    state: str | None
    state_digest: str | None
    detail: str
    first_seen_s: float
    last_seen_s: float

    @property
    def bundle(self) -> BundleRef | None:
        """The bundle that runs on the device, where it is known."""
        if self.bundle_name is None or self.bundle_version is None or self.bundle_digest is None:
            return None
        return BundleRef(
            name=self.bundle_name, version=self.bundle_version, digest=self.bundle_digest
        )


class ReportRow(Row, frozen=True, kw_only=True):
    """One report; ``at_s`` is on the device's clock, ``payload`` the message as it came."""

    tenant: str
    device: str
    session: str
    seq: int
    at_s: float
    received_s: float
    phase: str
    experience: int
    bundle_digest: str
    payload: bytes

    def report(self) -> Report:
        """The decoded message."""
        return Report.decode(self.payload)


class EventRow(Row, frozen=True, kw_only=True):
    """Something a device told at once; ``at_s`` is on the device's clock."""

    tenant: str
    device: str
    session: str
    at_s: float
    received_s: float
    kind: str
    detail: str


class AlarmRow(Row, frozen=True, kw_only=True):
    """A drift alarm: ``evidence`` reached ``threshold`` (both natural logarithms) after ``n``."""

    tenant: str
    device: str
    signal: str
    session: str
    raised_s: float
    evidence: float
    threshold: float
    bundle_digest: str
    n: int


class BundleRow(Row, frozen=True, kw_only=True):
    """A bundle whose signature was checked when it was pushed; ``file`` lies in ``bundles/``."""

    digest: str
    name: str
    version: int
    size_bytes: int
    parent: str | None
    created_s: float
    file: str
    manifest_json: bytes

    @property
    def ref(self) -> BundleRef:
        """How messages name it."""
        return BundleRef(name=self.name, version=self.version, digest=self.digest)

    def manifest(self) -> Manifest:
        """What the bundle says about itself."""
        return Manifest.decode(self.manifest_json)


class DesiredRow(Row, frozen=True, kw_only=True):
    """The bundle that a tenant's devices should run."""

    tenant: str
    digest: str
    set_s: float


class UpdateRow(Row, frozen=True, kw_only=True):
    """A tail that a device sent; ``file`` is relative to ``updates/``."""

    tenant: str
    device: str
    base_digest: str
    digest: str
    samples: int
    classes: tuple[int, ...]
    received_s: float
    file: str


class RejectedRow(Row, frozen=True, kw_only=True):
    """How many messages of a device were refused for one reason."""

    tenant: str
    device: str
    reason: str
    count: int
