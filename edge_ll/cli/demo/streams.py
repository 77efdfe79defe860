"""What each device of the demo sees: new classes with labels, known ones without, drift."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_ll_export.data import Dataset, Split
from edge_ll_export.recipe import Recipe

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stream:
    """One device's samples, in the form of :mod:`edge_ll_device.source`.

    Attributes:
        x: [N, *input].
        label: int64 [N], -1 where nobody says what it is.
        experience: int64 [N], from 1.
        drifts_at: Index of the first sample that is distorted; None where none is.
    """

    x: Array
    label: Rows
    experience: Rows
    drifts_at: int | None

    def save(self, path: Path) -> None:
        """Write the ``.npz`` file that an agent reads."""
        np.savez(path, x=self.x, label=self.label, experience=self.experience)


def device_streams(
    recipe: Recipe, dataset: Dataset, split: Split, *, devices: int, drifting: int
) -> list[Stream]:
    """Divide the stream and traffic parts among devices, as many samples of each class to each.

    In experience k a device meets its share of the k-th group of new classes with labels, mixed
    with its share of unlabelled traffic of the base classes. The device ``drifting`` gets distorted
    inputs from the second half of its experiences on.
    """
    rng = np.random.default_rng(recipe.seed)
    experiences = recipe.classes.experiences
    labelled = [_deal(dataset, split.stream, group, devices, rng) for group in experiences]
    traffic = _deal(dataset, split.traffic, recipe.classes.base, devices, rng)
    streams = []
    for device in range(devices):
        unlabelled = np.array_split(rng.permutation(traffic[device]), len(experiences))
        rows, label, experience = [], [], []
        for number, group in enumerate(labelled):
            mixed = np.concatenate([group[device], unlabelled[number]])
            known = np.isin(dataset.y[mixed], recipe.classes.base)
            order = rng.permutation(len(mixed))
            rows.append(mixed[order])
            label.append(np.where(known, -1, dataset.y[mixed])[order])
            experience.append(np.full(len(mixed), number + 1, np.int64))
        x = dataset.x[np.concatenate(rows)].copy()
        drifts_at = None
        if device == drifting:
            drifts_at = sum(len(part) for part in rows[: len(rows) // 2])
            x[drifts_at:] = distort(x[drifts_at:])
        streams.append(Stream(x, np.concatenate(label), np.concatenate(experience), drifts_at))
    return streams


def distort(x: Array) -> Array:
    """A sensor that changed: images turned by 90 degrees, waveforms through a covered microphone.

    The microphone is a moving average over 16 samples, which leaves little above 500 Hz at 8 kHz.
    """
    if x.ndim == 4:
        return np.rot90(x, axes=(2, 3)).copy()
    kernel = np.ones(16) / 16
    muffled = np.stack([np.convolve(row.astype(np.float64), kernel, "same") for row in x])
    return muffled.astype(x.dtype)


def _deal(
    dataset: Dataset, rows: Rows, classes: tuple[int, ...], hands: int, rng: np.random.Generator
) -> list[Rows]:
    """Rows of the classes, dealt out evenly class by class."""
    parts: list[list[Rows]] = [[] for _ in range(hands)]
    for label in classes:
        mine = rng.permutation(rows[dataset.y[rows] == label])
        for hand, part in zip(parts, np.array_split(mine, hands), strict=True):
            hand.append(part)
    return [np.concatenate(part) for part in parts]
