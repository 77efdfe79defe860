"""The fleet's memory: devices, reports, alarms, bundles and what is desired, in one SQLite file.

Several threads and processes may use one file at a time: ``edge-ll push`` writes while
``edge-ll fleet serve`` runs. Every ``record_*`` is one transaction and may be repeated.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edge_ll.errors import RegistryError
from edge_ll.fleet import schema
from edge_ll.fleet.rows import (
    AlarmRow,
    BundleRow,
    DesiredRow,
    DeviceRow,
    EventRow,
    RejectedRow,
    ReportRow,
    Row,
    UpdateRow,
)
from edge_ll.fleet.schema import sa
from edge_ll.messages import Birth, BundleRef, Event, Evidence, Report, Reported, Status

DATABASE = "fleet.sqlite3"
"""Name of the registry's file in the server's data folder."""

R = TypeVar("R", bound=Row)


class Registry:
    """Typed reads and idempotent writes.

    Args:
        where: A path, or a URL ``sqlite:///path``.
        clock: Seconds since the epoch, for every time that the server stamps.

    Raises:
        RegistryError: The file cannot be opened or has an unknown schema version.
    """

    def __init__(self, where: str | Path, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = schema.open_database(where)
        self._clock = clock
        # Threads of this process queue here, fairly, instead of polling SQLite's file lock.
        self._writing = threading.Lock()

    def close(self) -> None:
        """Close every connection; idempotent."""
        self._engine.dispose()

    # What devices say.

    def record_birth(self, tenant: str, device: str, birth: Birth) -> bool:
        """Keep who a device is; whether it was unknown until now."""
        facts = {
            "session": birth.session,
            "online": True,
            "engine": birth.engine,
            "provider": birth.provider,
            "runtime": birth.runtime,
            "agent_version": birth.agent_version,
            "machine": birth.machine,
            "rss_bytes": birth.rss_bytes,
            **_bundle_facts(birth.bundle),
        }
        with self._write() as connection:
            return self._see(connection, tenant, device, facts)

    def record_status(
        self, tenant: str, device: str, status: Status, *, retained: bool = False
    ) -> bool:
        """Keep whether a device is connected; whether it was unknown until now.

        The will of an earlier session can come after the birth of the next one, so going offline
        counts for the current session only. A ``retained`` status is no sign of life.
        """
        table = schema.devices
        with self._write() as connection:
            new = self._see(connection, tenant, device, {}, moves=not retained)
            change = sa.update(table).where(_is_device(table, tenant, device))
            if status.online:
                change = change.values(online=True, session=status.session)
            else:
                current = sa.or_(table.c.session == status.session, table.c.session.is_(None))
                change = change.where(current).values(online=False)
            connection.execute(change)
        return new

    def record_report(self, tenant: str, device: str, report: Report, payload: bytes) -> bool:
        """Keep a report; False when it was known already."""
        values = {
            "tenant": tenant,
            "device": device,
            "session": report.session,
            "seq": report.seq,
            "at_s": report.at_s,
            "received_s": self._clock(),
            "phase": report.phase,
            "experience": report.experience,
            "bundle_digest": report.bundle.digest,
            "payload": payload,
        }
        table = schema.devices
        with self._write() as connection:
            self._see(connection, tenant, device, {})
            fresh = _insert_once(connection, schema.reports, values)
            if fresh and report.rss_bytes:
                mine = sa.and_(_is_device(table, tenant, device), table.c.session == report.session)
                connection.execute(sa.update(table).where(mine).values(rss_bytes=report.rss_bytes))
            return fresh

    def record_event(self, tenant: str, device: str, event: Event) -> bool:
        """Keep an event; False when it was known already."""
        values = {
            "tenant": tenant,
            "device": device,
            "received_s": self._clock(),
            **msgspec.to_builtins(event),
        }
        with self._write() as connection:
            self._see(connection, tenant, device, {})
            return _insert_once(connection, schema.events, values)

    def record_reported(
        self, tenant: str, device: str, reported: Reported, *, retained: bool = False
    ) -> bool:
        """Keep what a device made of an offer; whether it was unknown until now."""
        facts: dict[str, Any] = {
            "state": reported.state,
            "state_digest": reported.bundle.digest,
            "detail": reported.detail,
        }
        if reported.state == "active":
            facts |= _bundle_facts(reported.bundle)
        with self._write() as connection:
            return self._see(connection, tenant, device, facts, moves=not retained)

    def raise_alarm(
        self, tenant: str, device: str, signal: str, *, report: Report, evidence: Evidence
    ) -> bool:
        """Keep a drift alarm of a known device; False when this session raised it already.

        An alarm that lasts is raised again for the next bundle: its device stays out of merges.
        """
        values = {
            "tenant": tenant,
            "device": device,
            "signal": signal,
            "session": report.session,
            "raised_s": self._clock(),
            "evidence": evidence.peak,
            "threshold": evidence.threshold,
            "bundle_digest": report.bundle.digest,
            "n": evidence.n,
        }
        with self._write() as connection:
            return _insert_once(connection, schema.alarms, values)

    def reject(self, tenant: str, device: str, reason: str) -> int:
        """Count one refused message; the new count."""
        key = {"tenant": tenant, "device": device, "reason": reason}
        table = schema.rejected
        first = schema.insert(table).values(**key, count=1)
        statement = first.on_conflict_do_update(
            index_elements=list(key), set_={"count": table.c.count + 1}
        ).returning(table.c.count)
        with self._write() as connection:
            return int(connection.execute(statement).scalar_one())

    # What the fleet does.

    def add_bundle(self, row: BundleRow) -> bool:
        """Keep a verified bundle; False when it was known already."""
        with self._write() as connection:
            return _insert_once(connection, schema.bundles, msgspec.structs.asdict(row))

    def set_desired(self, tenant: str, digest: str, *, expected: str | None = None) -> bool:
        """Choose a registered bundle for a tenant's devices.

        Args:
            tenant: Whose devices.
            digest: The bundle.
            expected: When given, change nothing unless this bundle is the desired one now.

        Returns:
            Whether the bundle is the desired one now.

        Raises:
            RegistryError: No such bundle is registered.
        """
        table = schema.desired
        values = {"digest": digest, "set_s": self._clock()}
        with self._write() as connection:
            if expected is not None:
                where = sa.and_(table.c.tenant == tenant, table.c.digest == expected)
                changed = connection.execute(sa.update(table).where(where).values(**values))
                return changed.rowcount == 1
            statement = schema.insert(table).values(tenant=tenant, **values)
            connection.execute(
                statement.on_conflict_do_update(index_elements=["tenant"], set_=values)
            )
            return True

    def record_update(self, row: UpdateRow) -> None:
        """Keep where a device's tail lies; the same tail sent again replaces its row."""
        values = msgspec.structs.asdict(row)
        statement = schema.insert(schema.updates).values(**values)
        keys = [column.name for column in schema.updates.primary_key]
        with self._write() as connection:
            self._see(connection, row.tenant, row.device, {})
            connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=values))

    # What is known.

    def devices(self, tenant: str) -> list[DeviceRow]:
        """A tenant's devices, by name."""
        table = schema.devices
        wanted = sa.select(table).where(table.c.tenant == tenant).order_by(table.c.device)
        return self._read(wanted, DeviceRow)

    def device(self, tenant: str, device: str) -> DeviceRow | None:
        """One device."""
        table = schema.devices
        return self._one(sa.select(table).where(_is_device(table, tenant, device)), DeviceRow)

    def reports(self, tenant: str, device: str) -> list[ReportRow]:
        """A device's reports in the order of arrival."""
        table = schema.reports
        wanted = sa.select(table).where(_is_device(table, tenant, device)).order_by(table.c.id)
        return self._read(wanted, ReportRow)

    def events(self, tenant: str, device: str | None = None) -> list[EventRow]:
        """Events in the order of arrival."""
        return self._of(schema.events, EventRow, tenant, device, schema.events.c.id)

    def alarms(
        self, tenant: str, device: str | None = None, *, bundle_digest: str | None = None
    ) -> list[AlarmRow]:
        """Drift alarms, oldest first."""
        alarms = self._of(schema.alarms, AlarmRow, tenant, device, schema.alarms.c.raised_s)
        return [row for row in alarms if bundle_digest in {None, row.bundle_digest}]

    def bundle(self, digest: str) -> BundleRow | None:
        """One bundle."""
        table = schema.bundles
        return self._one(sa.select(table).where(table.c.digest == digest), BundleRow)

    def bundles(self) -> list[BundleRow]:
        """Every bundle, oldest first."""
        return self._read(sa.select(schema.bundles).order_by(schema.bundles.c.created_s), BundleRow)

    def desired(self, tenant: str) -> DesiredRow | None:
        """What a tenant's devices should run."""
        table = schema.desired
        return self._one(sa.select(table).where(table.c.tenant == tenant), DesiredRow)

    def updates(self, tenant: str, device: str | None = None) -> list[UpdateRow]:
        """Tails that devices sent, oldest first."""
        return self._of(schema.updates, UpdateRow, tenant, device, schema.updates.c.received_s)

    def rejected(self, tenant: str, device: str | None = None) -> list[RejectedRow]:
        """How often what was refused."""
        return self._of(schema.rejected, RejectedRow, tenant, device, schema.rejected.c.reason)

    # How it is done.

    def _see(
        self,
        connection: sa.Connection,
        tenant: str,
        device: str,
        facts: Mapping[str, Any],
        *,
        moves: bool = True,
    ) -> bool:
        """Note a device and what it said; whether it was unknown. ``moves``: it is alive now."""
        now = self._clock()
        blank = {"online": False, "rss_bytes": 0, "detail": ""}
        times = {"first_seen_s": now, "last_seen_s": now}
        values = {"tenant": tenant, "device": device, **blank, **times, **facts}
        new = _insert_once(connection, schema.devices, values)
        changes = {**facts, "last_seen_s": now} if moves else dict(facts)
        if not new and changes:
            where = _is_device(schema.devices, tenant, device)
            connection.execute(sa.update(schema.devices).where(where).values(**changes))
        return new

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        try:
            with self._writing, self._engine.connect() as connection:
                immediate = connection.execution_options(immediate=True)
                with immediate.begin():
                    yield immediate
        except (sa.exc.SQLAlchemyError, OverflowError) as error:
            raise RegistryError(f"the registry refused to write: {error}") from error

    def _read(self, wanted: sa.Select[Any], kind: type[R]) -> list[R]:
        try:
            with self._engine.connect() as connection:
                found = connection.execute(wanted).mappings()
                # SQLAlchemy's names are a subclass of str, which msgspec does not take.
                rows = [{str(name): row[name] for name in row} for row in found]
        except sa.exc.SQLAlchemyError as error:
            raise RegistryError(f"the registry cannot be read: {error}") from error
        return [msgspec.convert(row, kind) for row in rows]

    def _one(self, wanted: sa.Select[Any], kind: type[R]) -> R | None:
        return next(iter(self._read(wanted, kind)), None)

    def _of(
        self, table: sa.Table, kind: type[R], tenant: str, device: str | None, order: Any
    ) -> list[R]:
        wanted = sa.select(table).where(table.c.tenant == tenant)
        if device is not None:
            wanted = wanted.where(table.c.device == device)
        return self._read(wanted.order_by(order), kind)


def _insert_once(connection: sa.Connection, table: sa.Table, values: Mapping[str, Any]) -> bool:
    """Insert unless a unique key is taken; whether a row was added."""
    done = connection.execute(schema.insert(table).values(**values).on_conflict_do_nothing())
    return bool(done.rowcount == 1)


def _is_device(table: sa.Table, tenant: str, device: str) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.tenant == tenant, table.c.device == device)


def _bundle_facts(bundle: BundleRef | None) -> dict[str, Any]:
    return {
        "bundle_name": bundle.name if bundle else None,
        "bundle_version": bundle.version if bundle else None,
        "bundle_digest": bundle.digest if bundle else None,
    }
