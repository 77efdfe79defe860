"""Moving a file in chunks: the receiver pulls what it misses, so a transfer resumes.

The same two types serve both directions: a device pulling a bundle, the fleet pulling an update.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from edge_ll.errors import DataError, ProtocolError
from edge_ll.messages import CHUNK_BYTES


def read_chunk(path: Path, index: int) -> bytes:
    """Chunk ``index`` of a file; empty past its end."""
    with path.open("rb") as file:
        file.seek(index * CHUNK_BYTES)
        return file.read(CHUNK_BYTES)


class Receiver:
    """One incoming file, kept on disk as ``{digest}.part`` with a map of the chunks that arrived.

    Data is written before its bit in the map, so a map never promises what the file lacks; a torn
    chunk is found by the final hash, and the transfer then starts anew.
    """

    def __init__(self, folder: Path, *, digest: str, size_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.digest = digest
        self.size_bytes = size_bytes
        self.chunks = -(-size_bytes // CHUNK_BYTES)
        self._part = folder / f"{digest}.part"
        self._map = folder / f"{digest}.map"
        self._arrived = bytearray(self.chunks)
        if self._part.exists() and self._map.exists():
            kept = self._map.read_bytes()
            if len(kept) == self.chunks and set(kept) <= {0, 1}:
                self._arrived = bytearray(kept)

    @property
    def arrived(self) -> int:
        """How many chunks are here."""
        return sum(self._arrived)

    def missing(self, limit: int) -> list[int]:
        """The first ``limit`` chunks that are not here yet."""
        return [index for index, here in enumerate(self._arrived) if not here][:limit]

    def accept(self, index: int, data: bytes) -> bool:
        """Keep one chunk; whether it was new.

        Raises:
            ProtocolError: There is no such chunk, or it has the wrong length.
            DataError: The disk does not take it; it is still missing.
        """
        if not 0 <= index < self.chunks:
            raise ProtocolError(f"chunk {index} of a file of {self.chunks} chunks")
        expected = min(CHUNK_BYTES, self.size_bytes - index * CHUNK_BYTES)
        if len(data) != expected:
            raise ProtocolError(f"chunk {index}: expected {expected} bytes, got {len(data)}")
        if self._arrived[index]:
            return False
        try:
            with self._part.open("r+b" if self._part.exists() else "w+b") as file:
                file.seek(index * CHUNK_BYTES)
                file.write(data)
            self._arrived[index] = 1
            self._map.write_bytes(self._arrived)
        except OSError as error:
            self._arrived[index] = 0
            raise DataError(f"chunk {index} cannot be kept: {error}") from error
        return True

    def finish(self, target: Path) -> None:
        """Check the whole file's sha256 and move it to ``target``.

        Raises:
            ProtocolError: Chunks are missing, or the hash is wrong; then all chunks are dropped.
        """
        if self.missing(1):
            raise ProtocolError(f"{self.chunks - self.arrived} of {self.chunks} chunks are missing")
        with self._part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.digest:
            self.discard()
            raise ProtocolError(f"expected a file with sha256 {self.digest}, got {digest}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._part.open("rb+") as file:
            os.fsync(file.fileno())
        self._part.replace(target)
        self._map.unlink()

    def discard(self) -> None:
        """Forget what arrived."""
        self._part.unlink(missing_ok=True)
        self._map.unlink(missing_ok=True)
        self._arrived = bytearray(self.chunks)


class Puller:
    """Decides what to ask for next: a window of chunks, asked again when it stalls.

    It has no clock: ``now_s`` is any steadily growing time in seconds.
    """

    def __init__(
        self,
        receiver: Receiver,
        request: Callable[[tuple[int, ...]], None],
        *,
        window: int = 16,
        stall_s: float = 2.0,
    ) -> None:
        self.receiver = receiver
        self._request = request
        self._window = window
        self._stall_s = stall_s
        self._asked: set[int] = set()
        self._last_s = float("-inf")

    @property
    def complete(self) -> bool:
        """Whether every chunk is here."""
        return self.receiver.arrived == self.receiver.chunks

    def accept(self, index: int, data: bytes, now_s: float) -> None:
        """Keep a chunk, and ask for the next window when this one is through."""
        if self.receiver.accept(index, data):
            self._last_s = now_s
        self._asked.discard(index)
        if not self._asked:
            self._ask(now_s)

    def tick(self, now_s: float) -> None:
        """Ask (again) when nothing came for a while."""
        if now_s - self._last_s >= self._stall_s:
            self._ask(now_s)

    def _ask(self, now_s: float) -> None:
        wanted = self.receiver.missing(self._window)
        self._asked, self._last_s = set(wanted), now_s
        if wanted:
            self._request(tuple(wanted))
