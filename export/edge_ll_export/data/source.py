"""Where the files of a data set come from: a folder of the user's, the cache, or a download.

``$EDGE_LL_DATA`` names a folder that holds the files ready-made, and then nothing is downloaded.
Without it they are in the user's cache, which one download fills. What is downloaded is converted
and its content checked before it is kept.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edge_ll.errors import DataError

# What reading an archive raises when bytes of it are wrong.
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
)

Arrays = Mapping[str, npt.NDArray[Any]]
Fetch = Callable[[str], bytes]

FOLDER = "EDGE_LL_DATA"


def ready_folder() -> Path | None:
    """The folder of ready-made files, where the user has one."""
    return Path(os.environ[FOLDER]) if FOLDER in os.environ else None


def cached(name: str) -> Path:
    """Where the user's cache keeps the file ``name``."""
    return Path.home() / ".cache" / "edge_ll" / name


def download(url: str, *, name: str, limit: int, fetch: Fetch | None = None) -> bytes:
    """The bytes behind ``url``.

    Args:
        url: HTTPS, fixed in the code.
        name: Of the ready-made file, for the advice where there is no network.
        limit: Largest size that is taken, in bytes.
        fetch: Gives the bytes behind a URL; by default an HTTPS download.

    Raises:
        DataError: No network, or more bytes than ``limit``.
    """
    try:
        raw = fetch(url) if fetch else _https(url, limit + 1)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{url} could not be downloaded: {error}; set {FOLDER} to a folder that holds "
            f"{name}, or try again with a network"
        ) from error
    if len(raw) > limit:
        raise DataError(f"{url} gives more than {limit} bytes; this is not what was expected")
    return raw


def keep(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file aside and rename it, so that a broken run leaves no half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def read_npz(path: Path, keys: Sequence[str]) -> Arrays:
    """The arrays of an ``.npz`` file, without pickle.

    Raises:
        DataError: There is no such file, or it does not hold them.
    """
    try:
        with np.load(path, allow_pickle=False) as pack:
            return {key: pack[key] for key in keys}
    except FileNotFoundError as error:
        raise DataError(_absent(path)) from error
    except (KeyError, TypeError, *DAMAGED) as error:
        raise DataError(
            f"{path}: expected an .npz file with {', '.join(keys)}: {error}; "
            f"delete it and try again"
        ) from error


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: There is no such file, or it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(_absent(path)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}; delete it and try again") from error


def check_digest(name: str, actual: str, expected: str) -> None:
    """Refuse content whose sha256 is another than the pinned one.

    Raises:
        DataError: What was expected, and what came.
    """
    if actual != expected:
        raise DataError(
            f"{name}: the content has sha256 {actual}, expected {expected}; "
            f"delete the file and let it be downloaded again"
        )


def array_sha256(arrays: Arrays, keys: Sequence[str]) -> str:
    """sha256 over arrays: for each the line ``name dtype shape``, then its bytes in C order."""
    digest = hashlib.sha256()
    for key in keys:
        array = arrays[key]
        digest.update(f"{key} {array.dtype.str} {list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _absent(path: Path) -> str:
    return f"{path} does not exist; put {path.name} there, or unset {FOLDER} to download it"


def _https(url: str, at_most: int) -> bytes:
    # The scheme is fixed by the constants that name the URLs.
    with urllib.request.urlopen(url, timeout=60) as reply:  # noqa: S310
        return bytes(reply.read(at_most))
