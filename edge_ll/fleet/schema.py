"""The registry's tables and how SQLite is opened: the part of the registry that knows SQL types."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

from edge_ll.errors import MissingExtraError, RegistryError

try:
    import sqlalchemy as sa
    from sqlalchemy.dialects.sqlite import insert
except ImportError as missing:  # pragma: no cover - the fleet extra is absent
    raise MissingExtraError("the fleet server", "fleet") from missing

__all__ = ["insert", "open_database", "sa"]

SCHEMA_VERSION = 1
"""Stored as SQLite's ``user_version``; another one is refused, never guessed at."""

BUSY_TIMEOUT_MS = 10_000
_WAL_TRIES = 100

METADATA = sa.MetaData()


def _text(name: str, *, key: bool = False, null: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text, primary_key=key, nullable=null)


def _number(name: str, *, key: bool = False, null: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, primary_key=key, nullable=null)


def _real(name: str) -> sa.Column[float]:
    return sa.Column(name, sa.Float, nullable=False)


def _device_key() -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["tenant", "device"], ["devices.tenant", "devices.device"])


devices = sa.Table(
    "devices",
    METADATA,
    _text("tenant", key=True),
    _text("device", key=True),
    _text("session", null=True),
    sa.Column("online", sa.Boolean, nullable=False),
    _text("engine", null=True),
    _text("provider", null=True),
    _text("runtime", null=True),
    _text("agent_version", null=True),
    _text("machine", null=True),
    _number("rss_bytes"),
    _text("bundle_name", null=True),
    _number("bundle_version", null=True),
    _text("bundle_digest", null=True),
    _text("state", null=True),
    _text("state_digest", null=True),
    _text("detail"),
    _real("first_seen_s"),
    _real("last_seen_s"),
)

# ``id`` keeps the order of arrival: clocks of devices cannot be compared.
reports = sa.Table(
    "reports",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    _text("tenant"),
    _text("device"),
    _text("session"),
    _number("seq"),
    _real("at_s"),
    _real("received_s"),
    _text("phase"),
    _number("experience"),
    _text("bundle_digest"),
    sa.Column("payload", sa.LargeBinary, nullable=False),
    sa.UniqueConstraint("tenant", "device", "session", "seq"),
    _device_key(),
)

events = sa.Table(
    "events",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    _text("tenant"),
    _text("device"),
    _text("session"),
    _real("at_s"),
    _real("received_s"),
    _text("kind"),
    _text("detail"),
    sa.UniqueConstraint("tenant", "device", "session", "at_s", "kind", "detail"),
    _device_key(),
)

alarms = sa.Table(
    "alarms",
    METADATA,
    _text("tenant", key=True),
    _text("device", key=True),
    _text("signal", key=True),
    _text("session", key=True),
    _text("bundle_digest", key=True),
    _real("raised_s"),
    _real("evidence"),
    _real("threshold"),
    _number("n"),
    _device_key(),
)

bundles = sa.Table(
    "bundles",
    METADATA,
    _text("digest", key=True),
    _text("name"),
    _number("version"),
    _number("size_bytes"),
    _text("parent", null=True),
    _real("created_s"),
    _text("file"),
    sa.Column("manifest_json", sa.LargeBinary, nullable=False),
)

desired = sa.Table(
    "desired",
    METADATA,
    _text("tenant", key=True),
    sa.Column("digest", sa.Text, sa.ForeignKey("bundles.digest"), nullable=False),
    _real("set_s"),
)

updates = sa.Table(
    "updates",
    METADATA,
    _text("tenant", key=True),
    _text("device", key=True),
    _text("base_digest", key=True),
    _text("digest", key=True),
    _number("samples"),
    sa.Column("classes", sa.JSON, nullable=False),
    _real("received_s"),
    _text("file"),
    _device_key(),
)

# Without a foreign key: what is refused may name a device that does not exist.
rejected = sa.Table(
    "rejected",
    METADATA,
    _text("tenant", key=True),
    _text("device", key=True),
    _text("reason", key=True),
    _number("count"),
)


def open_database(where: str | Path) -> sa.Engine:
    """Open or create the registry's SQLite file.

    Write-ahead logging lets readers and one writer work side by side, also across processes. A
    writing transaction takes the write lock at its start (``BEGIN IMMEDIATE``): there the busy
    timeout applies, whereas upgrading a read lock in the middle would fail at once.

    Raises:
        RegistryError: Not a SQLite file or URL, not writable, or of another schema version.
    """
    url = f"sqlite:///{where}" if isinstance(where, Path) or "://" not in where else where
    try:
        if sa.make_url(url).get_backend_name() != "sqlite":
            raise RegistryError(f"{where}: expected a SQLite path or a URL sqlite:///path")
        engine = sa.create_engine(url)
        sa.event.listen(engine, "connect", _on_connect)
        sa.event.listen(engine, "begin", _on_begin)
        _use_write_ahead_log(engine)
        with engine.connect().execution_options(immediate=True) as connection, connection.begin():
            _prepare(connection, str(where))
    except (sa.exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise RegistryError(f"{where}: cannot open the registry: {error}") from error
    return engine


def _on_connect(connection: Any, _record: Any) -> None:
    # The driver's own transaction control is off: only ``_on_begin`` starts one.
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = NORMAL")


def _on_begin(connection: sa.Connection) -> None:
    immediate = connection.get_execution_options().get("immediate", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _use_write_ahead_log(engine: sa.Engine) -> None:
    """Switch the file over; SQLite does not wait for other processes that do the same."""
    for attempt in range(_WAL_TRIES):
        raw = engine.raw_connection()
        try:
            raw.cursor().execute("PRAGMA journal_mode = WAL")
        except sqlite3.Error as error:
            locked = "locked" in str(error) or "busy" in str(error)
            if not locked or attempt == _WAL_TRIES - 1:
                raise RegistryError(f"cannot use write-ahead logging: {error}") from error
            time.sleep(0.05)
        else:
            return
        finally:
            raw.close()


def _prepare(connection: sa.Connection, where: str) -> None:
    version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
    if version == SCHEMA_VERSION:
        return
    if version == 0 and not sa.inspect(connection).get_table_names():
        METADATA.create_all(connection)
        connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
        return
    raise RegistryError(
        f"{where}: expected a registry of schema version {SCHEMA_VERSION}, got version {version}; "
        "use the edge-ll that wrote it, or another --data folder"
    )
