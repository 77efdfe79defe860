"""A labelled data set in memory, and its deterministic division into disjoint parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edge_ll.errors import DataError

InputKind = Literal["image", "waveform", "window", "text"]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class InputSpec:
    """What a backbone takes.

    | kind | shape | dtype |
    |---|---|---|
    | image | ``[C, H, W]`` | uint8 |
    | waveform | ``[samples]`` | int16 |
    | window | ``[T, C]``, the sensors side by side at each step | float32 |
    | text | ``[T]`` token ids, 0 behind the end | int64 |

    Attributes:
        shape: Of one sample, without the batch axis.
        dtype: numpy name of the raw type.
        full_scale: The raw value that the backbone maps to 1.0; of images and waveforms.
        sample_rate_hz: Of waveforms; 0 for all others.
        kind: Decides which backbones, teachers and augmentations fit.
    """

    shape: tuple[int, ...]
    dtype: str
    full_scale: float = 1.0
    sample_rate_hz: int = 0
    kind: InputKind = "image"


@dataclass(frozen=True)
class Dataset:
    """Raw samples with labels.

    Attributes:
        x: ``[N, *spec.shape]`` of ``spec.dtype``; scaling belongs to the backbone.
        y: int64 ``[N]``, class ids.
        group: int64 ``[N]``, index into ``group_names``: who or what produced the sample.
        group_names: Names of the groups, such as speakers.
        spec: Shape, type and scale of one sample.
    """

    x: npt.NDArray[Any]
    y: npt.NDArray[np.int64]
    group: npt.NDArray[np.int64]
    group_names: tuple[str, ...]
    spec: InputSpec

    def __post_init__(self) -> None:
        if self.x.shape != (len(self.y), *self.spec.shape) or self.x.dtype != self.spec.dtype:
            raise DataError(
                f"samples are {self.x.dtype}{list(self.x.shape)}; expected "
                f"{self.spec.dtype}{[len(self.y), *self.spec.shape]}"
            )
        if self.group.shape != self.y.shape:
            raise DataError(f"{len(self.y)} labels but {self.group.size} groups; expected as many")

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Split:
    """Disjoint parts of a data set, as sorted int64 indices into it.

    Attributes:
        train: Base classes; the only part that pre-training sees.
        traffic: Base classes; what devices see without labels.
        stream: New classes; what devices learn from, with labels.
        holdout: All classes; the server's gate.
        anchors: All classes; devices measure forgetting on them.
        test: All classes; published figures only.
    """

    train: Indices
    traffic: Indices
    stream: Indices
    holdout: Indices
    anchors: Indices
    test: Indices

    def parts(self) -> dict[str, Indices]:
        """Every part by its name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def split_dataset(
    dataset: Dataset,
    *,
    base: Sequence[int],
    new: Sequence[int],
    shares: dict[str, float],
    held_groups: Sequence[str] = (),
    seed: int,
) -> Split:
    """Divide ``dataset`` by class and group, so that every part has its share of each.

    Args:
        dataset: What to divide; classes outside ``base`` and ``new`` are left out.
        base: Classes of the pre-training.
        new: Classes that devices meet later.
        shares: Of ``test``, ``anchors``, ``holdout`` and ``traffic``, each in [0, 1).
        held_groups: Groups kept out of ``train`` and ``stream``. What they would add to
            ``train`` becomes ``traffic``; what they would add to ``stream`` is left out, for a
            speaker heard on new classes alone would teach the speaker, not the class.
        seed: Same seed, same split.

    Raises:
        DataError: A class or a group is not in the data set.
    """
    _check_known(dataset, [*base, *new], held_groups)
    held = {dataset.group_names.index(name) for name in held_groups}
    rng = np.random.default_rng(seed)
    parts: dict[str, list[Indices]] = {field.name: [] for field in fields(Split)}
    for label in (*base, *new):
        for group in range(len(dataset.group_names)):
            rows = rng.permutation(np.flatnonzero((dataset.y == label) & (dataset.group == group)))
            names = ["test", "anchors", "holdout"] + (["traffic"] if label in base else [])
            # Rounding the running sum spreads the odd sample over the parts.
            marks = np.rint(np.cumsum([shares[name] for name in names]) * len(rows)).astype(int)
            *pieces, rest = np.split(rows, marks)
            for name, piece in zip(names, pieces, strict=True):
                parts[name].append(piece)
            if label in base:
                parts["traffic" if group in held else "train"].append(rest)
            elif group not in held:
                parts["stream"].append(rest)
    return Split(
        **{
            name: np.sort(np.concatenate(pieces or [np.zeros(0, np.int64)])).astype(np.int64)
            for name, pieces in parts.items()
        }
    )


def _check_known(dataset: Dataset, classes: Sequence[int], held_groups: Sequence[str]) -> None:
    present = set(np.unique(dataset.y).tolist())
    if missing := sorted(set(classes) - present):
        raise DataError(f"classes {missing} have no samples; the data set has {sorted(present)}")
    if unknown := sorted(set(held_groups) - set(dataset.group_names)):
        raise DataError(
            f"held_groups {unknown} are not in the data set; it has {list(dataset.group_names)}"
        )
