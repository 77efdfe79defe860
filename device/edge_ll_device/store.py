"""What the agent keeps on disk, under one folder.

::

    bundles/{digest}.bundle   bundles that were verified
    current                   digest of the bundle that runs
    learned/{digest}.npz      what was learned on it
    incoming/                 a transfer under way
    outgoing/{digest}.f32     an update that the fleet may pull
    status.json               what `edge-ll-agent status` shows

Every file is written beside its place and renamed into it: a reader sees the old or the new.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import msgspec
import numpy as np

from edge_ll.bundle import Bundle
from edge_ll.engine.port import EngineState, Float32
from edge_ll.errors import BundleError, DataError
from edge_ll.trust import TrustStore
from edge_ll_device.learner import Snapshot
from edge_ll_device.replay import BufferState
from edge_ll_device.student import Learned, Tally


class Store:
    """The agent's folder.

    Args:
        folder: Made if it is missing.
        trust: Keys that may have signed a bundle.
    """

    def __init__(self, folder: Path, trust: TrustStore) -> None:
        self._folder = folder
        self._trust = trust
        try:
            for name in ("bundles", "learned", "incoming", "outgoing"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot keep the agent's state here: {error}") from error

    @property
    def incoming(self) -> Path:
        """Folder of a transfer under way."""
        return self._folder / "incoming"

    @property
    def outbox(self) -> Path:
        """The outbox's file."""
        return self._folder / "outbox.sqlite"

    def bundle_path(self, digest: str) -> Path:
        """Where a bundle lies, or would."""
        return self._folder / "bundles" / f"{digest}.bundle"

    def open_bundle(self, digest: str) -> Bundle:
        """Verify and open a bundle that lies here.

        Raises:
            BundleError: It is missing or damaged, or not the one that its name says.
            TrustError: It is not signed by a trusted key.
        """
        bundle = Bundle.open(self.bundle_path(digest), self._trust)
        if bundle.digest != digest:
            raise BundleError(f"expected bundle {digest}, the file is {bundle.digest}")
        return bundle

    def current(self) -> str | None:
        """Digest of the bundle to run; None before the first.

        Raises:
            DataError: The file is damaged.
        """
        path = self._folder / "current"
        try:
            return path.read_text("ascii").strip() if path.exists() else None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: expected the digest of a bundle: {error}") from error

    def set_current(self, digest: str) -> None:
        """Run this bundle from now on; others are deleted, for disks here are small."""
        self._write(self._folder / "current", digest.encode("ascii"))
        for folder in ("bundles", "learned"):
            for path in (self._folder / folder).iterdir():
                if path.stem != digest:
                    path.unlink()

    def drop_bundle(self, digest: str) -> None:
        """Delete a bundle that was refused."""
        self.bundle_path(digest).unlink(missing_ok=True)

    def save_learned(self, digest: str, learned: Learned) -> None:
        """Keep what was learned on a bundle, with the counts and the drift that belong to it."""
        snapshot = learned.snapshot
        buffer = io.BytesIO()
        np.savez(
            buffer,
            theta=snapshot.engine.theta,
            optimizer=np.frombuffer(snapshot.engine.optimizer, np.uint8),
            codes=snapshot.buffer.codes,
            labels=snapshot.buffer.labels,
            seen=snapshot.buffer.seen,
            known=snapshot.known,
            steps=np.int64(snapshot.steps),
            tally=np.frombuffer(msgspec.json.encode(learned.tally), np.uint8),
            drift=learned.drift,
        )
        self._write(self._folder / "learned" / f"{digest}.npz", buffer.getvalue())

    def load_learned(self, digest: str) -> Learned | None:
        """What was learned on a bundle; None where nothing was.

        Raises:
            DataError: The file is damaged; it is kept beside its place for inspection.
        """
        path = self._folder / "learned" / f"{digest}.npz"
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                snapshot = Snapshot(
                    EngineState(file["theta"], file["optimizer"].tobytes()),
                    BufferState(file["codes"], file["labels"], file["seen"]),
                    file["known"],
                    int(file["steps"]),
                )
                tally = msgspec.json.decode(file["tally"].tobytes(), type=Tally)
                return Learned(snapshot, tally, file["drift"])
        except Exception as error:  # numpy and zipfile raise many kinds on a damaged file
            aside = path.with_suffix(".damaged")
            path.replace(aside)
            raise DataError(f"{path.name} is damaged ({error}); moved to {aside.name}") from error

    def save_update(self, theta: Float32) -> str:
        """Lay θ out for the fleet to pull; its digest. Earlier updates are deleted."""
        data = theta.astype("<f4").tobytes()
        digest = hashlib.sha256(data).hexdigest()
        for path in (self._folder / "outgoing").iterdir():
            path.unlink()
        self._write(self.update_path(digest), data)
        return digest

    def update_path(self, digest: str) -> Path:
        """Where an update lies, or would."""
        return self._folder / "outgoing" / f"{digest}.f32"

    def save_status(self, status: dict[str, object]) -> None:
        """Replace the status that people read."""
        self._write(self._folder / "status.json", msgspec.json.encode(status))

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        staged = path.with_name(path.name + ".part")
        try:
            with staged.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error}") from error


def read_status(folder: Path) -> dict[str, object] | None:
    """The status that the agent last wrote; None where it never ran."""
    path = folder / "status.json"
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except msgspec.MsgspecError as error:
        raise DataError(f"{path}: {error}") from error
