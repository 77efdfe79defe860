"""Recorded streams: what is read is right, what is wrong is refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_ll.errors import DataError
from edge_ll_device.source import RecordedStream

X = np.arange(12, dtype=np.float32).reshape(4, 3)
LABEL = np.array([0, -1, 2, 1])
EXPERIENCE = np.array([1, 1, 2, 2])


def _write(path: Path, **changes) -> Path:
    arrays = {"x": X, "label": LABEL, "experience": EXPERIENCE} | changes
    np.savez(path, **{name: a for name, a in arrays.items() if a is not None})
    return path


def test_samples_come_in_order(tmp_path):
    stream = RecordedStream(_write(tmp_path / "s.npz"))
    samples = list(stream.samples())
    assert len(stream) == len(samples) == 4
    assert [sample.label for sample in samples] == [0, None, 2, 1]
    assert [sample.experience for sample in samples] == [1, 1, 2, 2]
    assert all(type(s.label) is int for s in samples if s.label is not None)
    assert np.array_equal(np.stack([sample.x for sample in samples]), X)


@pytest.mark.parametrize(("skip", "left"), [(0, 4), (1, 3), (4, 0), (9, 0)])
def test_a_stream_goes_on_where_it_was_left(tmp_path, skip, left):
    samples = list(RecordedStream(_write(tmp_path / "s.npz")).samples(skip))
    assert len(samples) == left
    if left:
        assert np.array_equal(samples[0].x, X[skip])


def test_an_empty_stream_is_one(tmp_path):
    path = _write(tmp_path / "s.npz", x=X[:0], label=LABEL[:0], experience=EXPERIENCE[:0])
    assert list(RecordedStream(path).samples()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"x": None},
        {"label": None},
        {"experience": None},
        {"x": X[:3]},
        {"label": LABEL[:3]},
        {"experience": np.append(EXPERIENCE, 3)},
        {"x": np.array([{}, {}, {}, {}], object)},
        {"label": np.array([0, None, 2, 1], object)},
        {"label": np.array(["0", "1", "2", "3"])},
        {"label": np.array([0.0, np.nan, 2.0, 1.0])},
        {"label": np.array([0.5, 1.5, 2.5, 0.5])},
        {"label": LABEL[:, None]},
        {"label": np.repeat(LABEL[:, None], 2, axis=1)},
        {"label": np.array([True, False, True, True])},
        {"experience": np.array([1.0, 1.5, 2.0, np.nan])},
        {"experience": np.array(["a", "b", "c", "d"])},
        {"experience": np.array([2, 2, 1, 1])},
        {"x": np.float32(1), "label": np.int64(1), "experience": np.int64(1)},
    ],
    ids=lambda changes: ",".join(f"{k} {getattr(v, 'dtype', v)}" for k, v in changes.items()),
)
def test_wrong_arrays_are_refused_when_the_file_is_read(tmp_path, changes):
    with pytest.raises(DataError, match=r"s\.npz"):
        RecordedStream(_write(tmp_path / "s.npz", **changes))


def _npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, X)


def _cut(path: Path) -> None:
    path.write_bytes(_write(path).read_bytes()[:-40])


def _flipped(path: Path) -> None:
    data = bytearray(_write(path).read_bytes())
    data[120] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not an archive"),
        lambda path: path.write_bytes(b"PK\x03\x04 not quite an archive"),
        lambda path: path.write_bytes(b"\x80\x04N."),
        _npy,
        _cut,
        _flipped,
    ],
    ids=["missing", "folder", "empty", "text", "zip head", "pickle", "npy", "cut", "flipped"],
)
def test_a_damaged_file_is_refused(tmp_path, write):
    write(tmp_path / "s.npz")
    with pytest.raises(DataError, match=r"s\.npz"):
        RecordedStream(tmp_path / "s.npz")
