"""Where samples come from: a recorded stream in an ``.npz`` file.

Arrays: ``x`` [N, *input]; ``label`` int64 [N], -1 where nobody said what it is; ``experience``
int64 [N], growing, the number of the experience that a sample belongs to, from 1.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edge_ll.errors import DataError


class Sample(NamedTuple):
    """One input with, maybe, its label."""

    x: npt.NDArray[Any]
    label: int | None
    experience: int


class RecordedStream:
    """Samples in the order of the file."""

    def __init__(self, path: Path) -> None:
        arrays = _read(path)
        self._x, self._label = arrays["x"], arrays["label"]
        self._experience = arrays["experience"]
        for name in ("label", "experience"):
            if arrays[name].dtype.kind not in "iu" or arrays[name].ndim != 1:
                raise DataError(
                    f"{path}: {name}: expected integers [N], got {arrays[name].dtype} "
                    f"{list(arrays[name].shape)}"
                )
        if not self._x.ndim or len({len(array) for array in arrays.values()}) != 1:
            raise DataError(f"{path}: x, label and experience differ in length")
        if (np.diff(self._experience) < 0).any():
            raise DataError(f"{path}: experience: expected numbers that never fall")

    def __len__(self) -> int:
        return len(self._x)

    def samples(self, skip: int = 0) -> Iterator[Sample]:
        """Every sample from number ``skip`` on."""
        for x, label, experience in zip(
            self._x[skip:], self._label[skip:], self._experience[skip:], strict=True
        ):
            yield Sample(x, None if label < 0 else int(label), int(experience))


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise DataError(f"{path}: expected an .npz file, got a single array")
        with loaded as file:
            return {name: file[name] for name in ("x", "label", "experience")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: expected an .npz file with x, label and experience: {error}"
        ) from error
