"""Gives the fleet what was learned here: an update that it may pull."""

from __future__ import annotations

from collections.abc import Callable

from edge_ll.messages import (
    Command,
    CommandResult,
    Message,
    UpdateChunk,
    UpdateOffer,
    UpdateRequest,
)
from edge_ll.transfer import read_chunk
from edge_ll_device.store import Store
from edge_ll_device.student import Student


class Uploads:
    """Answers the fleet's command to upload, and its requests for chunks."""

    def __init__(self, store: Store, send: Callable[[Message], None]) -> None:
        self._store = store
        self._send = send
        self._offered: UpdateOffer | None = None

    def command(self, command: Command, student: Student | None) -> None:
        """Lay out θ as it is now, and offer it; a command that comes twice gets the same offer."""
        if student is None:
            self._send(CommandResult(id=command.id, ok=False, detail="no bundle runs here yet"))
            return
        if self._offered is None or self._offered.command != command.id:
            theta = student.learner.engine.theta
            self._offered = UpdateOffer(
                command=command.id,
                base=student.bundle.digest,
                digest=self._store.save_update(theta),
                size_bytes=theta.nbytes,
                samples=student.tally.learned_here,
                classes=student.learner.known_classes,
            )
        self._send(self._offered)
        self._send(CommandResult(id=command.id, ok=True))

    def request(self, request: UpdateRequest) -> None:
        """Send the chunks that are asked for; an update that is no longer here is not."""
        path = self._store.update_path(request.digest)
        if not path.exists():
            return
        for index in request.indices:
            data = read_chunk(path, index)
            if data:
                self._send(UpdateChunk(digest=request.digest, index=index, data=data))
