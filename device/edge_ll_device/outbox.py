"""Messages that wait on disk until the broker has acknowledged them."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from edge_ll.errors import DataError, TransportError
from edge_ll.messages import Address, Message
from edge_ll.transport import Delivery, Transport

WINDOW = 20
CAPACITY = 10_000
RECENT = 64
RECENT_S = 60.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    topic TEXT NOT NULL,
    payload BLOB NOT NULL,
    retain INTEGER NOT NULL,
    delivered_s REAL  -- NULL while it waits
)
"""


class Outbox:
    """A bounded queue in SQLite; when it is full the oldest message makes room, and is counted.

    Delivery is at least once: after a lost connection, what was not acknowledged is sent again. A
    broker may acknowledge a message and then die, or have nobody to give it to, so what was
    delivered lately is kept a while and sent again when the fleet makes itself heard.

    Args:
        path: The database file.
        address: Whose messages these are.
        steady: Seconds that never jump.
    """

    def __init__(
        self, path: Path, address: Address, *, steady: Callable[[], float] = time.monotonic
    ) -> None:
        self._address = address
        self._steady = steady
        self._in_flight: dict[int, Delivery] = {}
        self.dropped = 0
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(_SCHEMA)
            self._db.execute("DELETE FROM outbox WHERE delivered_s IS NOT NULL")
        except sqlite3.Error as error:
            raise DataError(f"{path}: cannot be used as an outbox: {error}") from error

    def __len__(self) -> int:
        counted = self._run("SELECT count(*) FROM outbox WHERE delivered_s IS NULL")
        return int(counted.fetchone()[0])

    def put(self, message: Message) -> None:
        """Keep a message until it is delivered."""
        while len(self) >= CAPACITY:
            self._run(
                "DELETE FROM outbox WHERE id ="
                " (SELECT min(id) FROM outbox WHERE delivered_s IS NULL)"
            )
            self.dropped += 1
        self._run(
            "INSERT INTO outbox (topic, payload, retain) VALUES (?, ?, ?)",
            (message.topic(self._address), message.encode(), message.retain),
        )

    def drain(self, transport: Transport) -> None:
        """Note what was acknowledged and send what may go; never waits."""
        for row, delivery in list(self._in_flight.items()):
            if delivery.wait(0):
                self._delivered(row)
        if not transport.connected:
            self._in_flight.clear()
            return
        waiting = self._run(
            "SELECT id, topic, payload, retain FROM outbox WHERE delivered_s IS NULL"
            " ORDER BY id LIMIT ?",
            (WINDOW,),
        ).fetchall()
        for row, topic, payload, retain in waiting:
            if row in self._in_flight:
                continue
            try:
                self._in_flight[row] = transport.publish(topic, payload, retain=bool(retain))
            except TransportError:
                return

    def reconnected(self) -> None:
        """Send again what the lost connection left open."""
        self._in_flight.clear()

    def fleet_is_back(self) -> None:
        """Send again what was delivered lately; the fleet may not have been there to hear it."""
        self._run(
            "UPDATE outbox SET delivered_s = NULL WHERE delivered_s > ?",
            (self._steady() - RECENT_S,),
        )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _run(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise DataError(f"the outbox failed: {error}; what waited may be lost") from error

    def _delivered(self, row: int) -> None:
        del self._in_flight[row]
        self._run("UPDATE outbox SET delivered_s = ? WHERE id = ?", (self._steady(), row))
        self._run(
            "DELETE FROM outbox WHERE delivered_s IS NOT NULL AND (delivered_s < ? OR id NOT IN"
            " (SELECT id FROM outbox WHERE delivered_s IS NOT NULL ORDER BY id DESC LIMIT ?))",
            (self._steady() - RECENT_S, RECENT),
        )
