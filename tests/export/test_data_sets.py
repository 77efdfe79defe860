"""CIFAR-10, CLINC150 and the user's own file: read, downloaded, and refused."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edge_ll.config import load
from edge_ll.errors import DataError
from edge_ll_export.data import cifar10, clinc150, source
from edge_ll_export.data import file as own
from edge_ll_export.recipe import DataFile, Recipe
from tests.tiny_tokenizer import TINY_TOKENIZER

RECIPES = Path(__file__).parents[2] / "export" / "recipes"
NEEDS_DATA = pytest.mark.skipif("EDGE_LL_DATA" not in os.environ, reason="EDGE_LL_DATA is not set")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without ready-made data."""
    monkeypatch.delenv("EDGE_LL_DATA", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path / ".cache" / "edge_ll"


@pytest.fixture
def tokens(monkeypatch):
    """A tokenizer of a few words in place of the pre-trained one."""
    pytest.importorskip("tokenizers")
    monkeypatch.setattr("edge_ll_export.data.tokens.minilm_file", lambda _: TINY_TOKENIZER)


def test_a_download_has_a_limit_and_says_what_to_do():
    with pytest.raises(DataError, match="more than 3 bytes"):
        source.download("https://x", name="x.npz", limit=3, fetch=lambda _: b"four")

    def broken(_):
        raise OSError("no route")

    with pytest.raises(
        DataError, match=r"no route; set EDGE_LL_DATA to a folder that holds x\.npz"
    ):
        source.download("https://x", name="x.npz", limit=3, fetch=broken)


def test_a_file_is_kept_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "x"
    source.keep(target, lambda file: file.write(b"whole"))

    def fails(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        source.keep(target, fails)
    assert target.read_bytes() == b"whole"
    assert list(target.parent.iterdir()) == [target]


# CIFAR-10.


def _jpeg(level: int, size: tuple[int, int] = (32, 32)) -> bytes:
    image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    image.new("RGB", size, (level, 2 * level, 255 - level)).save(out, "JPEG")
    return out.getvalue()


def _images(**changes: bytes) -> bytes:
    """Three images of each class and part, in no order; two are wanted of train, one of test."""
    files = {
        f"{part}/{name}/{number:04d}.jpg": _jpeg(10 * place + number)
        for part in ("train", "test")
        for place, name in enumerate(cifar10.CLASSES)
        for number in (2, 0, 1)
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in ({"README.md": b""} | files | changes).items():
            if data is not None:
                archive.writestr(f"CIFAR-10-images-master/{name}", data)
    return out.getvalue()


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(cifar10, "_TAKEN", {"train": 2, "test": 1})


def test_images_are_downloaded_once_class_by_class(home, few, monkeypatch):
    arrays = cifar10.convert_archive(_images())
    assert arrays["train_y"].tolist() == [c for c in range(10) for _ in range(2)]
    assert arrays["test_x"].shape == (10, 32, 32, 3)
    levels = arrays["train_x"][:, 5, 5, 0].astype(int)
    assert np.abs(levels - [10 * c + n for c in range(10) for n in (0, 1)]).max() <= 3
    monkeypatch.setattr(cifar10, "CONTENT_SHA256", source.array_sha256(arrays, cifar10._KEYS))
    asked = []
    first = cifar10.load_cifar10(fetch=lambda url: asked.append(url) or _images())
    again = cifar10.load_cifar10(fetch=lambda url: asked.append(url) or _images())
    assert asked == [cifar10.URL]
    assert [p.name for p in home.iterdir()] == ["cifar10_12k.npz"]
    assert first.x.shape == (30, 3, 32, 32)
    assert (first.x == again.x).all()
    assert (first.y == np.concatenate([arrays["train_y"], arrays["test_y"]])).all()


def test_other_images_are_refused_and_not_cached(home, few):
    with pytest.raises(DataError, match="CIFAR-10: the content has sha256"):
        cifar10.load_cifar10(fetch=lambda _: _images())
    assert not home.exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train/cat/0000.jpg": b"GIF89a"}, "train/cat/0000 is not a JPEG file"),
        ({"test/dog/0000.jpg": bytes(1 << 17)}, "too large"),
        (dict.fromkeys([f"train/frog/000{n}.jpg" for n in (0, 1)]), "train/frog has 1 images"),
    ],
)
def test_a_bad_archive_of_images_is_refused(few, changes, says):
    with pytest.raises(DataError, match=says):
        cifar10.convert_archive(_images(**changes))


def test_an_image_of_another_size_or_no_archive_is_refused(few):
    with pytest.raises(DataError, match="32x32"):
        cifar10.convert_archive(_images(**{"train/cat/0000.jpg": _jpeg(3, (16, 32))}))
    with pytest.raises(DataError, match="damaged"):
        cifar10.convert_archive(b"no zip")


@NEEDS_DATA
def test_the_real_images_are_the_pinned_ones():
    dataset = cifar10.load_cifar10()
    assert dataset.x.shape == (12_000, 3, 32, 32)
    assert np.bincount(dataset.y).tolist() == [1200] * 10
    assert load(RECIPES / "cifar10.toml", Recipe).classes.labels == cifar10.CLASSES


# CLINC150.

FULL = {
    "train": [["Play a song", "music"], ["turn on", "light"]],
    "val": [["lights on", "light"]],
    "test": [["play", "music"]],
    "oos_train": [["who are you", "oos"]],
}
DOMAINS = {"home": ["light", "music"]}


def _requests(full=FULL, domains=DOMAINS):
    files = {"data_full.json": full, "domains.json": domains}
    return lambda url: json.dumps(files[url.rsplit("/", 1)[1]]).encode()


def test_requests_are_downloaded_once_and_become_token_ids(home, tokens, monkeypatch):
    pinned = clinc150.content_sha256({"domains": DOMAINS} | FULL)
    monkeypatch.setattr(clinc150, "CONTENT_SHA256", pinned)
    first = clinc150.load_clinc150(fetch=_requests())
    again = clinc150.load_clinc150(fetch=lambda _: pytest.fail("asked twice"))
    assert [p.name for p in home.iterdir()] == ["clinc150.json"]
    assert first.y.tolist() == [1, 0, 0, 1]
    assert first.x.shape == (4, 32)
    assert (first.x == again.x).all()
    assert (first.x[3] != 0).sum() < (first.x[0] != 0).sum()


def test_the_hash_of_the_requests_ignores_their_order_and_sees_each_of_them():
    pack = {"domains": DOMAINS} | FULL
    first = clinc150.content_sha256(pack)
    assert clinc150.content_sha256(pack | {"train": FULL["train"][::-1]}) == first
    assert clinc150.content_sha256(pack | {"val": [["lights off", "light"]]}) != first
    assert clinc150.content_sha256(pack | {"domains": {"home": ["music", "light"]}}) != first


@pytest.mark.parametrize(
    ("full", "domains", "says"),
    [
        (FULL, DOMAINS, "CLINC150: the content has sha256"),
        ({"train": []}, DOMAINS, "do not fit together"),
        ({**FULL, "val": [["alone"]]}, DOMAINS, "do not fit together"),
        (FULL, ["home"], "do not fit together"),
        ([1], DOMAINS, "expected a table, got list"),
    ],
)
def test_other_requests_are_refused_and_not_cached(home, full, domains, says):
    with pytest.raises(DataError, match=says):
        clinc150.load_clinc150(fetch=_requests(full, domains))
    assert not home.exists()


def test_requests_that_are_missing_or_no_json_are_named(tmp_path):
    with pytest.raises(DataError, match=r"does not exist; put clinc150\.json there"):
        clinc150.load_clinc150(folder=tmp_path)
    (tmp_path / "clinc150.json").write_bytes(b"{")
    with pytest.raises(DataError, match="is not JSON"):
        clinc150.load_clinc150(folder=tmp_path)


@NEEDS_DATA
def test_the_recipe_names_the_real_intents():
    pack = source.read_json(Path(os.environ["EDGE_LL_DATA"]) / "clinc150.json")
    clinc150.check_content(pack)
    assert load(RECIPES / "clinc150.toml", Recipe).classes.labels == clinc150.intents(pack)


# The user's own file.

X = {
    "image": np.zeros((4, 3, 5, 6), np.uint8),
    "waveform": np.zeros((4, 100), np.int16),
    "window": np.zeros((4, 10, 3), np.float32),
}
Y = np.array([0, 1, 0, 1])


def _table(path, kind="window", shape=(10, 3), rate=0):
    return DataFile(path=str(path), kind=kind, shape=shape, sample_rate_hz=rate)


@pytest.mark.parametrize("kind", X)
def test_own_samples_of_each_kind(tmp_path, kind):
    np.savez(tmp_path / "mine.npz", x=X[kind], y=Y.astype(np.int8), group=["b", "a", "b", "b"])
    rate = 8000 if kind == "waveform" else 0
    table = _table(tmp_path / "mine.npz", kind, X[kind].shape[1:], rate)
    dataset = own.load_file(table)
    assert (dataset.x == X[kind]).all()
    assert (dataset.y == Y).all()
    assert dataset.y.dtype == np.int64
    assert [dataset.group_names[g] for g in dataset.group] == ["b", "a", "b", "b"]
    assert dataset.spec == own.file_spec(table)
    assert (dataset.spec.kind, dataset.spec.sample_rate_hz) == (kind, rate)


def test_own_texts_become_token_ids(tmp_path, tokens):
    np.savez(tmp_path / "mine.npz", x=np.array(["play a song", "turn on", "", "play"]), y=Y)
    dataset = own.load_file(_table(tmp_path / "mine.npz", "text", (8,)))
    assert dataset.x.shape == (4, 8)
    assert dataset.x.dtype == np.int64
    assert (dataset.x[3] != dataset.x[1]).any()
    assert dataset.group_names == ("mine",)


def test_a_relative_path_starts_at_the_folder_of_data(tmp_path, monkeypatch):
    np.savez(tmp_path / "mine.npz", x=X["window"], y=Y)
    monkeypatch.setenv("EDGE_LL_DATA", str(tmp_path))
    assert len(own.load_file(_table("mine.npz"))) == 4
    monkeypatch.delenv("EDGE_LL_DATA")
    monkeypatch.chdir(tmp_path)
    assert len(own.load_file(_table("mine.npz"))) == 4


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": X["window"]}, "it has no y"),
        ({"y": Y}, "it has no x"),
        ({"x": X["window"].astype(np.float64), "y": Y}, r"samples are float64\[4, 10, 3\]"),
        ({"x": X["window"][:, :9], "y": Y}, r"expected float32\[4, 10, 3\]"),
        ({"x": X["window"], "y": Y[:3]}, "one for each of 4 samples"),
        ({"x": X["window"], "y": Y * 0.5}, "y: expected integers"),
        ({"x": X["window"], "y": Y[:, None]}, "y: expected integers"),
        ({"x": X["window"] + np.float32(np.nan), "y": Y}, "not finite"),
        ({"x": X["window"], "y": Y, "group": Y * 0.5}, "group: expected strings or integers"),
        ({"x": X["window"], "y": Y, "group": Y[:2]}, "group: expected strings or integers"),
        ({"x": np.float32(1), "y": Y}, "single value"),
        ({"x": np.array([None, 1]), "y": Y}, "expected an .npz file with x and y"),
    ],
)
def test_own_data_of_another_form_is_refused(tmp_path, arrays, says):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(DataError, match=says) as caught:
        own.load_file(_table(tmp_path / "mine.npz"))
    assert "mine.npz" in str(caught.value)


def test_own_data_that_is_no_archive_is_refused(tmp_path):
    np.save(tmp_path / "one.npy", Y)
    (tmp_path / "damaged.npz").write_bytes(b"PK damaged")
    for name, says in (("one.npy", "single array"), ("damaged.npz", "expected an"), ("no", "no")):
        with pytest.raises(DataError, match=says):
            own.load_file(_table(tmp_path / name))
    np.savez(tmp_path / "mine.npz", x=np.zeros(4, np.float32), y=Y)
    with pytest.raises(DataError, match="x: expected strings"):
        own.load_file(_table(tmp_path / "mine.npz", "text", (8,)))
