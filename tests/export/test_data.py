from __future__ import annotations

import io
import os
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edge_ll.errors import DataError
from edge_ll_export.data import Dataset, InputSpec, digits, fsdd, split_dataset

SHARES = {"test": 0.15, "anchors": 0.1, "holdout": 0.1, "traffic": 0.15}
BASE, NEW = (0, 1, 2), (3, 4)


def _dataset(per_class=40, groups=("a", "b")):
    y = np.repeat(np.arange(5), per_class * len(groups))
    group = np.tile(np.repeat(np.arange(len(groups)), per_class), 5)
    spec = InputSpec(shape=(1,), dtype="uint8", full_scale=1.0)
    x = np.zeros((len(y), 1), np.uint8)
    return Dataset(x=x, y=y, group=group, group_names=tuple(groups), spec=spec)


def _split(dataset, **over):
    return split_dataset(dataset, **{"base": BASE, "new": NEW, "shares": SHARES, "seed": 3} | over)


def test_parts_are_disjoint_and_cover_everything():
    dataset = _dataset()
    rows = np.concatenate(list(_split(dataset).parts().values()))
    assert sorted(rows) == list(range(len(dataset)))


def test_each_part_has_its_share_of_each_class():
    dataset = _dataset()
    parts = _split(dataset).parts()
    everyone, base = {"test": 12, "anchors": 8, "holdout": 8}, {"traffic": 12, "train": 40}
    for label in range(5):
        counts = {name: int((dataset.y[rows] == label).sum()) for name, rows in parts.items()}
        own = base if label in BASE else {"stream": 52}
        assert {name: count for name, count in counts.items() if count} == everyone | own


def test_the_seed_decides_the_split():
    dataset = _dataset()
    first, again, other = _split(dataset), _split(dataset), _split(dataset, seed=4)
    assert all((first.parts()[name] == rows).all() for name, rows in again.parts().items())
    assert not np.array_equal(first.train, other.train)


def test_held_groups_never_give_labels_to_learn_from():
    dataset = _dataset()
    split = _split(dataset, held_groups=["b"])
    assert set(dataset.group[split.train]) == {0}
    assert set(dataset.group[split.stream]) == {0}
    assert set(dataset.group[split.traffic]) == {0, 1}
    assert set(dataset.group[split.test]) == {0, 1}


def test_unknown_classes_and_groups_are_named():
    with pytest.raises(DataError, match=r"classes \[7\] have no samples"):
        _split(_dataset(), new=(7,))
    with pytest.raises(DataError, match=r"\['zoe'\] are not in the data set"):
        _split(_dataset(), held_groups=["zoe"])


def test_a_dataset_refuses_another_shape():
    spec = InputSpec(shape=(2,), dtype="uint8", full_scale=1.0)
    y = np.zeros(3, np.int64)
    with pytest.raises(DataError, match=r"expected uint8\[3, 2\]"):
        Dataset(x=np.zeros((3, 2)), y=y, group=y, group_names=("a",), spec=spec)


def test_digits_are_raw_images():
    pytest.importorskip("sklearn")
    dataset = digits.load_digits()
    assert dataset.x.shape == (1797, 1, 8, 8)
    assert dataset.x.dtype == np.uint8
    assert dataset.x.max() == digits.SPEC.full_scale
    assert set(dataset.y) == set(range(10))


def _wav(samples, *, rate=8000):
    out = io.BytesIO()
    with wave.open(out, "wb") as clip:
        clip.setnchannels(1)
        clip.setsampwidth(2)
        clip.setframerate(rate)
        clip.writeframes(np.asarray(samples, "<i2").tobytes())
    return out.getvalue()


def _zip(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(f"free-spoken-digit-dataset-1.0.10/{name}", data)
    return out.getvalue()


SMALL = {
    "recordings/1_theo_10.wav": _wav([1, -2, 3]),
    "recordings/1_theo_2.wav": _wav([4, 5]),
    "recordings/0_ann_0.wav": _wav(np.arange(9000)),
    "README.md": b"not a recording",
}


def test_an_archive_becomes_the_pack_in_canonical_order():
    arrays = fsdd.convert_archive(_zip(SMALL))
    assert arrays["digit"].tolist() == [0, 1, 1]
    assert arrays["take"].tolist() == [0, 2, 10]
    assert arrays["speakers"].tolist() == ["ann", "theo"]
    assert arrays["offsets"].tolist() == [0, 9000, 9002, 9005]
    assert arrays["samples"][-5:].tolist() == [4, 5, 1, -2, 3]


def test_the_content_hash_ignores_the_order_of_recordings_and_sees_every_sample():
    arrays = dict(fsdd.convert_archive(_zip(SMALL)))
    first = fsdd.content_sha256(arrays)
    swapped = arrays | {
        "samples": np.concatenate([arrays["samples"][9000:], arrays["samples"][:9000]]),
        "offsets": np.array([0, 2, 5, 9005]),
        "digit": arrays["digit"][[1, 2, 0]],
        "speaker": arrays["speaker"][[1, 2, 0]],
        "take": arrays["take"][[1, 2, 0]],
    }
    assert fsdd.content_sha256(swapped) == first
    samples = arrays["samples"].copy()
    samples[17] += 1
    assert fsdd.content_sha256(arrays | {"samples": samples}) != first


def test_a_download_is_checked_cached_and_padded(tmp_path, monkeypatch):
    raw = _zip(SMALL)
    monkeypatch.setattr(fsdd, "CONTENT_SHA256", fsdd.content_sha256(fsdd.convert_archive(raw)))
    monkeypatch.delenv("EDGE_LL_DATA", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    asked = []

    def fetch(url):
        asked.append(url)
        return raw

    dataset = fsdd.load_fsdd(fetch=fetch)
    assert asked == [fsdd.URL]
    assert (tmp_path / ".cache" / "edge_ll" / "fsdd.npz").exists()
    assert dataset.x.shape == (3, 8000)
    assert dataset.x[0, -1] == 7999
    assert dataset.x[1, :4].tolist() == [4, 5, 0, 0]
    again = fsdd.load_fsdd(fetch=fetch)
    assert len(asked) == 1
    assert (again.x == dataset.x).all()


def test_other_content_is_refused_and_not_cached(tmp_path):
    target = tmp_path / "fsdd.npz"
    with pytest.raises(DataError, match="has sha256"):
        fsdd.download_fsdd(target, fetch=lambda _: _zip(SMALL))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_says_what_to_do(tmp_path):
    def fetch(url):
        raise OSError("no route")

    with pytest.raises(DataError, match="set EDGE_LL_DATA"):
        fsdd.download_fsdd(tmp_path / "fsdd.npz", fetch=fetch)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"no zip", "damaged"),
        (_zip({"README.md": b""}), "holds no recordings"),
        (_zip({"recordings/0_ann_0.wav": b"RIFF"}), "not a wav file"),
        (_zip({"recordings/0_ann_0.wav": _wav([1], rate=16000)}), "8000 Hz"),
        (_zip({"recordings/0_ann_0.wav": bytes(2 << 20)}), "too large"),
    ],
)
def test_a_bad_archive_is_refused(raw, says):
    with pytest.raises(DataError, match=says):
        fsdd.convert_archive(raw)


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        fsdd.load_fsdd(folder=tmp_path)
    (tmp_path / "fsdd.npz").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"expected an \.npz file"):
        fsdd.load_fsdd(folder=tmp_path)


@pytest.mark.skipif("EDGE_LL_DATA" not in os.environ, reason="EDGE_LL_DATA is not set")
def test_the_real_content_survives_the_way_through_an_archive():
    folder = Path(os.environ["EDGE_LL_DATA"])
    with np.load(folder / "fsdd.npz", allow_pickle=False) as pack:
        arrays = {key: pack[key] for key in pack.files}
    files = {}
    for row, (digit, speaker, take) in enumerate(
        zip(arrays["digit"], arrays["speaker"], arrays["take"], strict=True)
    ):
        clip = arrays["samples"][arrays["offsets"][row] : arrays["offsets"][row + 1]]
        files[f"recordings/{digit}_{arrays['speakers'][speaker]}_{take}.wav"] = _wav(clip)
    converted = fsdd.convert_archive(_zip(files))
    assert fsdd.content_sha256(converted) == fsdd.CONTENT_SHA256
    dataset = fsdd.load_fsdd(folder=folder)
    assert dataset.x.shape == (3000, 8000)
    assert len(dataset.group_names) == 6
