"""The agent's folder: a reader sees the old or the new, never half of either."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edge_ll.engine import EngineState
from edge_ll.errors import BundleError, DataError, TrustError
from edge_ll.metrics import Counts
from edge_ll.trust import Signer
from edge_ll_device.learner import Snapshot
from edge_ll_device.replay import BufferState
from edge_ll_device.store import Store, read_status
from edge_ll_device.student import Learned, Tally
from tests.tiny_bundle import TRUST, write_tiny_bundle

DIGEST, OTHER = "a" * 64, "b" * 64
TALLY = Tally(taken=9, seen=8, learned=7, refused=1, experience=2, prequential=Counts(5, 7))


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "state", TRUST)


DRIFT = np.array([0.5, -np.inf, 3.0])


def _learned(seed: int = 0) -> Learned:
    return Learned(_snapshot(seed), TALLY, DRIFT)


def _snapshot(seed: int = 0) -> Snapshot:
    rng = np.random.default_rng(seed)
    return Snapshot(
        EngineState(rng.random(5).astype(np.float32), rng.bytes(48)),
        BufferState(
            rng.integers(-128, 127, (3, 2), np.int8), np.array([0, 1, 1]), np.array([4, 9, 0])
        ),
        np.array([0, 1]),
        12,
    )


def _same(a: Snapshot, b: Snapshot) -> bool:
    pairs = [(a.engine.theta, b.engine.theta), (a.known, b.known), *zip(a[1], b[1], strict=True)]
    return (
        all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)
        and a.engine.optimizer == b.engine.optimizer
        and a.steps == b.steps
    )


def test_what_was_learned_comes_back_exactly(store):
    store.save_learned(DIGEST, _learned())
    learned = store.load_learned(DIGEST)
    assert _same(learned.snapshot, _snapshot())
    assert learned.tally == TALLY
    assert np.array_equal(learned.drift, DRIFT)
    assert store.load_learned(OTHER) is None


class PowerCutError(BaseException):
    """No code may catch it."""


# What is written -> (write number ``step``, which number is read back).
WRITES = {
    "learned": (
        lambda store, step: store.save_learned(DIGEST, _learned(step)),
        lambda store, step: _same(store.load_learned(DIGEST)[0], _snapshot(step)),
    ),
    "current": (
        lambda store, step: store.set_current((DIGEST, OTHER)[step]),
        lambda store, step: store.current() == (DIGEST, OTHER)[step],
    ),
    "status": (
        lambda store, step: store.save_status({"step": step}),
        lambda store, step: read_status(store._folder) == {"step": step},
    ),
}


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace")])
@pytest.mark.parametrize(("write", "is_at"), WRITES.values(), ids=WRITES)
def test_a_crash_between_write_and_rename_leaves_the_old(
    tmp_path, monkeypatch, owner, name, write, is_at
):
    def cut(*_):
        raise PowerCutError

    write(Store(tmp_path / "state", TRUST), 0)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, cut)
        with pytest.raises(PowerCutError):
            write(Store(tmp_path / "state", TRUST), 1)
    store = Store(tmp_path / "state", TRUST)
    assert is_at(store, 0)
    write(store, 1)
    assert is_at(store, 1)


def _cut_file(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip(data: bytes) -> bytes:
    at = data.index(b"\x93NUMPY") + 140
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [_cut_file, _flip, lambda _: b"", lambda _: b"PK\x03\x04", lambda data: data[:-1]],
    ids=["cut", "bit flip", "empty", "head only", "last byte"],
)
def test_damaged_learning_is_moved_aside(store, tmp_path, damage):
    store.save_learned(DIGEST, _learned())
    path = tmp_path / "state" / "learned" / f"{DIGEST}.npz"
    data = damage(path.read_bytes())
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"damaged.*moved to"):
        store.load_learned(DIGEST)
    assert not path.exists()
    assert path.with_suffix(".damaged").read_bytes() == data
    assert store.load_learned(DIGEST) is None
    store.save_learned(DIGEST, _learned())
    assert store.load_learned(DIGEST) is not None


def test_pickled_learning_is_refused(store, tmp_path):
    path = tmp_path / "state" / "learned" / f"{DIGEST}.npz"
    np.savez(path, theta=np.array([{}], object))
    with pytest.raises(DataError):
        store.load_learned(DIGEST)


def test_a_bundle_is_opened_under_its_own_digest_only(store, tmp_path):
    bundle = write_tiny_bundle(tmp_path / "b")
    data = (tmp_path / "b").read_bytes()
    store.bundle_path(bundle.digest).write_bytes(data)
    assert store.open_bundle(bundle.digest).digest == bundle.digest
    store.bundle_path(DIGEST).write_bytes(data)
    with pytest.raises(BundleError, match=f"expected bundle {DIGEST}, the file is {bundle.digest}"):
        store.open_bundle(DIGEST)
    with pytest.raises(BundleError):
        store.open_bundle(OTHER)


def test_a_bundle_of_a_stranger_is_refused(store, tmp_path):
    bundle = write_tiny_bundle(tmp_path / "b", signer=Signer.generate())
    store.bundle_path(bundle.digest).write_bytes((tmp_path / "b").read_bytes())
    with pytest.raises(TrustError, match="unknown key"):
        store.open_bundle(bundle.digest)


def test_switching_deletes_the_others(store, tmp_path):
    for digest in (DIGEST, OTHER):
        store.bundle_path(digest).write_bytes(b"x")
        store.save_learned(digest, _learned())
    assert store.current() is None
    store.set_current(DIGEST)
    assert store.current() == DIGEST
    assert store.bundle_path(DIGEST).exists()
    assert not store.bundle_path(OTHER).exists()
    assert store.load_learned(DIGEST) is not None
    assert store.load_learned(OTHER) is None
    store.drop_bundle(DIGEST)
    store.drop_bundle(DIGEST)
    assert not store.bundle_path(DIGEST).exists()


def test_an_update_is_little_endian_float32_under_its_hash(store):
    import hashlib

    theta = np.array([1.5, -2.0, 0.0], np.float32)
    digest = store.save_update(theta)
    data = store.update_path(digest).read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest
    assert np.frombuffer(data, "<f4").tolist() == theta.tolist()
    second = store.save_update(theta * 2)
    assert not store.update_path(digest).exists()
    assert store.update_path(second).exists()


def test_status_round_trip(store, tmp_path):
    assert read_status(tmp_path / "state") is None
    store.save_status({"tally": TALLY, "bundle": None})
    status = read_status(tmp_path / "state")
    assert status["bundle"] is None
    assert status["tally"]["prequential"] == [5, 7]


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_status_is_said(tmp_path, damage):
    (tmp_path / "status.json").write_bytes(damage)
    with pytest.raises(DataError, match=r"status\.json"):
        read_status(tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(DataError, match="state"):
        Store(tmp_path / "state", TRUST)


def test_a_full_disk_is_an_error_of_ours(store, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        store.save_learned(DIGEST, _learned())
