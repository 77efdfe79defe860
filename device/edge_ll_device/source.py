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
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in ("x", "label", "experience")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path}: expected an .npz file with x, label and experience: {error}"
            ) from error
        self._x, self._label = arrays["x"], arrays["label"]
        self._experience = arrays["experience"]
        if not len(self._x) == len(self._label) == len(self._experience):
            raise DataError(f"{path}: x, label and experience differ in length")

    def __len__(self) -> int:
        return len(self._x)

    def samples(self, skip: int = 0) -> Iterator[Sample]:
        """Every sample from number ``skip`` on."""
        for x, label, experience in zip(
            self._x[skip:], self._label[skip:], self._experience[skip:], strict=True
        ):
            yield Sample(x, None if label < 0 else int(label), int(experience))
