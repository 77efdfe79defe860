"""Messages that wait on disk until the broker has acknowledged them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from edge_ll.errors import DataError, TransportError
from edge_ll.messages import Address, Message
from edge_ll.transport import Delivery, Transport

WINDOW = 20
CAPACITY = 10_000


class Outbox:
    """A bounded queue in SQLite; when it is full the oldest message makes room, and is counted.

    Delivery is at least once: after a lost connection, what was not acknowledged is sent again.
    """

    def __init__(self, path: Path, address: Address) -> None:
        self._address = address
        self._in_flight: dict[int, Delivery] = {}
        self.dropped = 0
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS outbox (id INTEGER PRIMARY KEY AUTOINCREMENT,"
                " topic TEXT NOT NULL, payload BLOB NOT NULL, retain INTEGER NOT NULL)"
            )
        except sqlite3.Error as error:
            raise DataError(f"{path}: cannot be used as an outbox: {error}") from error

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM outbox").fetchone()[0])

    def put(self, message: Message) -> None:
        """Keep a message until it is delivered."""
        while len(self) >= CAPACITY:
            self._db.execute("DELETE FROM outbox WHERE id = (SELECT min(id) FROM outbox)")
            self.dropped += 1
        self._db.execute(
            "INSERT INTO outbox (topic, payload, retain) VALUES (?, ?, ?)",
            (message.topic(self._address), message.encode(), message.retain),
        )

    def drain(self, transport: Transport) -> None:
        """Forget what was acknowledged and send what may go; never waits."""
        for row, delivery in list(self._in_flight.items()):
            if delivery.wait(0):
                self._db.execute("DELETE FROM outbox WHERE id = ?", (row,))
                del self._in_flight[row]
        if not transport.connected:
            self._in_flight.clear()
            return
        for row, topic, payload, retain in self._db.execute(
            "SELECT id, topic, payload, retain FROM outbox ORDER BY id LIMIT ?", (WINDOW,)
        ).fetchall():
            if row in self._in_flight:
                continue
            try:
                self._in_flight[row] = transport.publish(topic, payload, retain=bool(retain))
            except TransportError:
                return

    def reconnected(self) -> None:
        """Send again what the lost connection left open."""
        self._in_flight.clear()

    def close(self) -> None:
        """Close the file."""
        self._db.close()
