"""Free Spoken Digit Dataset: 3,000 recordings of ten digits by six speakers at 8 kHz.

Source: Z. Jackson et al., github.com/Jakobovski/free-spoken-digit-dataset (CC BY-SA 4.0).

The recordings are read from ``$EDGE_LL_DATA/fsdd.npz`` where that is set, else from the user's
cache, which is filled by one download. Archives made by GitHub are not stable byte for byte, so
what is pinned is the *content*: the sha256 over every sample and label in a canonical order. It
is the same for the ready-made file and for a converted download.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import wave
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_ll.errors import DataError
from edge_ll_export.data import source
from edge_ll_export.data.dataset import Dataset, InputSpec
from edge_ll_export.data.source import Arrays, Fetch

SPEC = InputSpec(
    kind="waveform", shape=(8000,), dtype="int16", full_scale=32768.0, sample_rate_hz=8000
)
URL = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.zip"
CONTENT_SHA256 = "88bbf096b6feadea9b2a5346ccf23f8806d30e65ee0cfdebe90c686aa6646fe1"

_FILE = "fsdd.npz"
_MAX_ARCHIVE_BYTES = 64 << 20
_MAX_WAV_BYTES = 1 << 20
_MAX_RECORDINGS = 10_000
_NAME = re.compile(r"(?:^|/)recordings/(\d)_([a-z]+)_(\d{1,2})\.wav$")
_KEYS = ("samples", "offsets", "digit", "speaker", "take", "speakers")


def load_fsdd(*, folder: Path | None = None, fetch: Fetch | None = None) -> Dataset:
    """The recordings as int16 ``[3000, 8000]``: one second from the start, zeros behind.

    Recordings are trimmed at both ends by their makers, so the start is where speech begins;
    the 0.7 % that last longer than a second lose their end.

    Args:
        folder: Where ``fsdd.npz`` lies; by default ``$EDGE_LL_DATA``, else the user's cache.
        fetch: Gives the bytes behind a URL; by default an HTTPS download.

    Raises:
        DataError: The file is missing, cannot be downloaded, or is not the pinned content.
    """
    ready = folder or source.ready_folder()
    path = ready / _FILE if ready else source.cached(_FILE)
    if ready or path.exists():
        arrays = source.read_npz(path, _KEYS)
    else:
        arrays = download_fsdd(path, fetch=fetch)
    check_content(arrays)
    return _dataset(arrays)


def download_fsdd(target: Path, *, fetch: Fetch | None = None) -> Arrays:
    """Download the archive, convert it, check its content, and keep it at ``target``.

    Raises:
        DataError: The download failed, or is not the pinned content.
    """
    raw = source.download(URL, name=_FILE, limit=_MAX_ARCHIVE_BYTES, fetch=fetch)
    arrays = convert_archive(raw)
    check_content(arrays)
    kept = {key: arrays[key] for key in _KEYS}
    source.keep(target, lambda file: np.savez_compressed(file, **kept))  # type: ignore[arg-type]
    return arrays


def convert_archive(raw: bytes) -> Arrays:
    """Turn the upstream zip into the arrays of the dataset pack; nothing is written to disk.

    Raises:
        DataError: The archive is damaged, or holds a wav of another kind.
    """
    found: list[tuple[int, str, int, npt.NDArray[np.int16]]] = []
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            for info in archive.infolist():
                match = _NAME.search(info.filename)
                if match is None:
                    continue
                if info.file_size > _MAX_WAV_BYTES or len(found) >= _MAX_RECORDINGS:
                    raise DataError(f"{info.filename}: too large or one too many for FSDD")
                samples = _read_wav(archive.read(info), info.filename)
                found.append((int(match[1]), match[2], int(match[3]), samples))
    except source.DAMAGED as error:
        raise DataError(f"the FSDD archive is damaged: {error}; download it again") from error
    if not found:
        raise DataError(f"the archive holds no recordings/*.wav; expected the zip behind {URL}")
    found.sort(key=lambda item: item[:3])
    speakers = sorted({item[1] for item in found})
    return {
        "samples": np.concatenate([item[3] for item in found]),
        "offsets": np.cumsum([0] + [len(item[3]) for item in found], dtype=np.int64),
        "digit": np.array([item[0] for item in found], np.uint8),
        "speaker": np.array([speakers.index(item[1]) for item in found], np.uint8),
        "take": np.array([item[2] for item in found], np.uint8),
        "speakers": np.array(speakers),
    }


def content_sha256(arrays: Arrays) -> str:
    """sha256 over every recording by digit, speaker's name and take, whatever order they lie in.

    Each recording adds the line ``digit name take length`` and its samples as little-endian int16.
    """
    speakers = [str(name) for name in arrays["speakers"]]
    keys = [
        (int(digit), speakers[int(speaker)], int(take), row)
        for row, (digit, speaker, take) in enumerate(
            zip(arrays["digit"], arrays["speaker"], arrays["take"], strict=True)
        )
    ]
    digest = hashlib.sha256()
    for digit, name, take, row in sorted(keys):
        start, stop = int(arrays["offsets"][row]), int(arrays["offsets"][row + 1])
        digest.update(f"{digit} {name} {take} {stop - start}\n".encode())
        digest.update(arrays["samples"][start:stop].astype("<i2").tobytes())
    return digest.hexdigest()


def check_content(arrays: Arrays) -> None:
    """Refuse anything but the pinned content.

    Raises:
        DataError: The content is malformed or its sha256 is another.
    """
    try:
        actual = content_sha256(arrays)
    except (IndexError, ValueError, TypeError) as error:
        raise DataError(f"FSDD's arrays do not fit together: {error}") from error
    source.check_digest("FSDD", actual, CONTENT_SHA256)


def _dataset(arrays: Arrays) -> Dataset:
    offsets, samples = arrays["offsets"], arrays["samples"]
    length = SPEC.shape[0]
    x = np.zeros((len(offsets) - 1, length), np.int16)
    for row, (start, stop) in enumerate(itertools.pairwise(offsets)):
        clip = samples[start : min(stop, start + length)]
        x[row, : len(clip)] = clip
    return Dataset(
        x=x,
        y=arrays["digit"].astype(np.int64),
        group=arrays["speaker"].astype(np.int64),
        group_names=tuple(str(name) for name in arrays["speakers"]),
        spec=SPEC,
    )


def _read_wav(raw: bytes, name: str) -> npt.NDArray[np.int16]:
    try:
        with wave.open(io.BytesIO(raw)) as clip:
            kind = (clip.getnchannels(), clip.getsampwidth(), clip.getframerate())
            frames = clip.readframes(clip.getnframes())
    except (wave.Error, EOFError) as error:
        raise DataError(f"{name} is not a wav file: {error}; download the archive again") from error
    if kind != (1, 2, SPEC.sample_rate_hz):
        raise DataError(f"{name}: expected mono, 2 bytes, 8000 Hz; got {kind}")
    return np.frombuffer(frames, "<i2").astype(np.int16)
