from __future__ import annotations

import hashlib
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_ll import transfer
from edge_ll.errors import ProtocolError
from edge_ll.messages import CHUNK_BYTES
from edge_ll.transfer import Puller, Receiver, read_chunk

SIZES = [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 7]


@pytest.fixture
def small(monkeypatch):
    """Chunks of eight bytes: the same arithmetic on less data."""
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 8)


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def receiver(folder: Path, data: bytes, **changes) -> Receiver:
    fields = {"digest": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)} | changes
    return Receiver(folder, **fields)


def cut(data: bytes, chunk: int = 8) -> list[bytes]:
    return [data[at : at + chunk] for at in range(0, len(data), chunk)]


@pytest.mark.parametrize("size", SIZES)
def test_a_file_goes_over_in_chunks(tmp_path, size):
    data = content(size)
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.write_bytes(data)
    incoming = receiver(tmp_path / "in", data)
    assert incoming.chunks == -(-size // CHUNK_BYTES)
    for index in incoming.missing(99):
        assert incoming.accept(index, read_chunk(source, index))
    assert read_chunk(source, incoming.chunks) == b""
    assert incoming.arrived == incoming.chunks
    incoming.finish(target)
    assert target.read_bytes() == data
    assert list((tmp_path / "in").iterdir()) == []


@given(st.integers(1, 70), st.data())
@settings(deadline=None)
def test_any_order_with_duplicates_and_restarts_gives_the_same_file(size, data):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CHUNK_BYTES", 8)
        folder, blob = Path(name), content(size)
        chunks = cut(blob)
        seen: set[int] = set()
        incoming = receiver(folder, blob)
        some = st.lists(st.integers(0, len(chunks) - 1), max_size=12)
        for index in [*data.draw(some), *data.draw(st.permutations(range(len(chunks))))]:
            if data.draw(st.booleans()):
                incoming = receiver(folder, blob)  # the process died and came back
            assert incoming.accept(index, chunks[index]) is (index not in seen)
            seen.add(index)
            assert incoming.arrived == len(seen)
            assert incoming.missing(99) == sorted(set(range(len(chunks))) - seen)
        incoming.finish(folder / "target")
        assert (folder / "target").read_bytes() == blob
        assert [item.name for item in folder.iterdir()] == ["target"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("index", "data"),
    [(3, b"x" * 8), (99, b""), (0, b""), (0, b"x" * 7), (0, b"x" * 9), (2, b"x" * 8), (2, b"x" * 3),
     (-1, b"x" * 4), (-1, b"x" * 8), (-3, b"x" * 8)],
)  # fmt: skip
def test_a_wrong_index_or_length_is_refused(tmp_path, index, data):
    incoming = receiver(tmp_path, content(20))
    with pytest.raises(ProtocolError, match=f"chunk {index}"):
        incoming.accept(index, data)
    assert incoming.arrived == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_only_as_many_as_asked_for_are_named(tmp_path):
    incoming = receiver(tmp_path, content(80))
    assert incoming.missing(3) == [0, 1, 2]
    incoming.accept(1, content(80)[8:16])
    assert incoming.missing(3) == [0, 2, 3]
    assert incoming.missing(0) == []


@pytest.mark.usefixtures("small")
def test_an_unfinished_file_is_not_handed_over(tmp_path):
    incoming = receiver(tmp_path / "in", content(20))
    incoming.accept(0, content(20)[:8])
    with pytest.raises(ProtocolError, match="2 of 3 chunks are missing"):
        incoming.finish(tmp_path / "target")
    assert incoming.arrived == 1
    assert not (tmp_path / "target").exists()


def wrong(incoming: Receiver, data: bytes) -> None:
    """Everything arrives, one byte of it wrong."""
    for index, chunk in enumerate(cut(bytes([data[0] ^ 1]) + data[1:])):
        incoming.accept(index, chunk)


@pytest.mark.usefixtures("small")
def test_a_wrong_hash_drops_everything_and_the_transfer_can_start_anew(tmp_path):
    data = content(20)
    incoming = receiver(tmp_path / "in", data)
    wrong(incoming, data)
    with pytest.raises(ProtocolError, match="expected a file with sha256"):
        incoming.finish(tmp_path / "target")
    assert incoming.missing(9) == [0, 1, 2]
    assert list((tmp_path / "in").iterdir()) == []
    assert not (tmp_path / "target").exists()
    for index, chunk in enumerate(cut(data)):
        incoming.accept(index, chunk)
    incoming.finish(tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == data


def half_done(folder: Path, data: bytes) -> tuple[Path, Path]:
    """Part and map of a transfer with its first two chunks."""
    incoming = receiver(folder, data)
    for index in (0, 1):
        incoming.accept(index, cut(data)[index])
    digest = incoming.digest
    return folder / f"{digest}.part", folder / f"{digest}.map"


def finish_at_last(folder: Path, data: bytes) -> int:
    """Restart, fetch what is missing, again if the hash was wrong; how many tries it took."""
    incoming = receiver(folder, data)
    for tries in (1, 2):
        for index in incoming.missing(99):
            incoming.accept(index, cut(data)[index])
        try:
            incoming.finish(folder / "target")
        except ProtocolError:
            continue
        assert (folder / "target").read_bytes() == data
        assert [item.name for item in folder.iterdir()] == ["target"]
        return tries
    pytest.fail("the transfer never finished")


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES = [
    ("nothing", lambda part, kept: None, 2, 1),
    ("short map", lambda part, kept: truncate(kept, 2), 0, 1),
    ("empty map", lambda part, kept: truncate(kept, 0), 0, 1),
    ("long map", lambda part, kept: kept.write_bytes(bytes(9)), 0, 1),
    ("no map", lambda part, kept: kept.unlink(), 0, 1),
    ("no part", lambda part, kept: part.unlink(), 0, 1),
    ("truncated part", lambda part, kept: truncate(part, 5), None, 2),
    ("empty part", lambda part, kept: truncate(part, 0), None, 2),
    ("torn part", lambda part, kept: part.write_bytes(bytes(16)), None, 2),
    ("map that promises all", lambda part, kept: kept.write_bytes(b"\1" * 4), None, 2),
    ("longer part", lambda part, kept: part.write_bytes(bytes(99)), None, 2),
]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("damage", "arrived", "tries"), [row[1:] for row in DAMAGES], ids=[row[0] for row in DAMAGES]
)
def test_a_restart_on_damaged_files_still_ends_with_the_right_file(
    tmp_path, damage, arrived, tries
):
    data = content(30)
    damage(*half_done(tmp_path, data))
    if arrived is not None:
        assert receiver(tmp_path, data).arrived == arrived
    assert finish_at_last(tmp_path, data) == tries


@pytest.mark.usefixtures("small")
def test_a_map_of_other_bytes_does_not_stop_a_transfer_for_ever(tmp_path):
    data = content(30)
    _, kept = half_done(tmp_path, data)
    kept.write_bytes(b"\1\xff\1\1")
    incoming = receiver(tmp_path, data)
    assert incoming.arrived <= incoming.chunks
    assert (incoming.arrived == incoming.chunks) is (not incoming.missing(1))


def test_two_transfers_share_a_folder(tmp_path):
    first, second = content(5), content(6)
    a, b = receiver(tmp_path, first), receiver(tmp_path, second)
    a.accept(0, first)
    b.accept(0, second)
    a.finish(tmp_path / "a")
    assert receiver(tmp_path, second).arrived == 1
    b.discard()
    assert [item.name for item in tmp_path.iterdir()] == ["a"]
    b.discard()  # again: nothing to forget


class Line:
    """A sender at the far end; it remembers what was asked and loses what it is told to."""

    def __init__(self, folder: Path, data: bytes, **options) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.chunks = cut(data)
        self.puller = Puller(receiver(folder, data), self.asked.append, **options)

    def deliver(self, *indices: int, at: float) -> None:
        for index in indices:
            self.puller.accept(index, self.chunks[index], at)


@pytest.mark.usefixtures("small")
def test_windows_follow_each_other(tmp_path):
    line = Line(tmp_path, content(8 * 5), window=2)
    line.puller.tick(0.0)
    assert line.asked == [(0, 1)]
    line.deliver(1, at=0.1)
    assert line.asked == [(0, 1)]
    line.deliver(0, at=0.2)
    line.deliver(2, 3, at=0.3)
    assert line.asked == [(0, 1), (2, 3), (4,)]
    assert not line.puller.complete
    line.deliver(4, at=0.4)
    assert line.puller.complete
    line.puller.tick(99.0)
    line.deliver(4, at=100.0)
    assert len(line.asked) == 3


@pytest.mark.usefixtures("small")
def test_a_stall_is_asked_again_and_only_then(tmp_path):
    line = Line(tmp_path, content(8 * 5), window=3, stall_s=2.0)
    line.puller.tick(10.0)
    line.deliver(0, 2, at=11.0)
    for now in (11.5, 12.9):
        line.puller.tick(now)
    assert line.asked == [(0, 1, 2)]
    line.puller.tick(13.0)
    line.puller.tick(13.1)
    assert line.asked == [(0, 1, 2), (1, 3, 4)]
    line.puller.tick(15.0)
    assert line.asked[2:] == [(1, 3, 4)]


@pytest.mark.usefixtures("small")
def test_what_was_not_asked_for_is_kept_too(tmp_path):
    line = Line(tmp_path, content(8 * 3), window=1)
    line.puller.tick(0.0)
    line.deliver(2, at=0.1)
    assert line.asked == [(0,)]
    line.deliver(0, 1, at=0.2)
    assert line.asked == [(0,), (1,)]
    assert line.puller.complete


@pytest.mark.usefixtures("small")
def test_a_bad_chunk_is_refused_and_asked_for_again(tmp_path):
    line = Line(tmp_path, content(8 * 2), window=2, stall_s=1.0)
    line.puller.tick(0.0)
    line.deliver(1, at=0.1)
    with pytest.raises(ProtocolError):
        line.puller.accept(0, b"short", 0.2)
    line.puller.tick(1.2)
    assert line.asked == [(0, 1), (0,)]


@pytest.mark.usefixtures("small")
def test_repeated_chunks_do_not_hide_a_stall(tmp_path):
    """A sender that repeats what is here already must not postpone the question for ever."""
    line = Line(tmp_path, content(8 * 3), window=3, stall_s=1.0)
    line.puller.tick(0.0)
    line.deliver(0, at=0.0)
    for step in range(1, 40):
        line.deliver(0, at=step / 4)
        line.puller.tick(step / 4)
    assert len(line.asked) > 1


@pytest.mark.usefixtures("small")
def test_a_wrong_file_is_pulled_anew(tmp_path):
    data = content(8 * 2)
    line = Line(tmp_path / "in", data, window=9, stall_s=1.0)
    wrong(line.puller.receiver, data)
    assert line.puller.complete
    with pytest.raises(ProtocolError):
        line.puller.receiver.finish(tmp_path / "target")
    assert not line.puller.complete
    line.puller.tick(5.0)
    assert line.asked == [(0, 1)]


@given(
    st.integers(1, 120), st.integers(1, 9), st.floats(0, 0.8), st.integers(0, 2**32), st.booleans()
)
@settings(deadline=None, max_examples=60)
def test_it_completes_on_a_bad_line(size, window, loss, seed, restarts):
    rng, data, now = random.Random(seed), content(size), 0.0
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "CHUNK_BYTES", 8)
        folder, chunks = Path(name), cut(data)
        line: list[tuple[int, ...]] = []
        puller = Puller(receiver(folder, data), line.append, window=window, stall_s=1.0)
        while not puller.complete:
            now += 0.25
            assert now < 2000
            puller.tick(now)
            asked = [index for indices in line for index in indices]
            assert all(len(indices) <= window for indices in line)
            line.clear()
            rng.shuffle(asked)
            for index in asked:
                for _ in range(rng.choice([1, 1, 2])):  # a broker may repeat a message
                    if rng.random() >= loss:
                        puller.accept(index, chunks[index], now)
            if restarts and rng.random() < 0.1:
                puller = Puller(receiver(folder, data), line.append, window=window, stall_s=1.0)
        puller.receiver.finish(folder / "target")
        assert (folder / "target").read_bytes() == data
