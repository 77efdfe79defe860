"""The user's own data: an ``.npz`` file with samples and labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_ll.errors import DataError
from edge_ll_export.data import source
from edge_ll_export.data.dataset import Dataset, InputKind, InputSpec
from edge_ll_export.data.tokens import token_ids

if TYPE_CHECKING:
    from edge_ll_export.recipe import DataFile

_DTYPES: dict[InputKind, tuple[str, float]] = {
    "image": ("uint8", 255.0),
    "waveform": ("int16", 32768.0),
    "window": ("float32", 1.0),
    "text": ("int64", 1.0),
}


def file_spec(table: DataFile) -> InputSpec:
    """What the recipe says about the samples."""
    dtype, full_scale = _DTYPES[table.kind]
    return InputSpec(
        shape=table.shape,
        dtype=dtype,
        full_scale=full_scale,
        sample_rate_hz=table.sample_rate_hz,
        kind=table.kind,
    )


def load_file(table: DataFile) -> Dataset:
    """The samples of ``table.path``; a relative path starts at ``$EDGE_LL_DATA`` where that is set.

    | array | holds |
    |---|---|
    | ``x`` | samples ``[N, *shape]`` in the dtype of their kind; texts as strings ``[N]`` |
    | ``y`` | integers ``[N]``, the classes |
    | ``group`` | strings or integers ``[N]``, may be left out: who or what a sample comes from |

    Raises:
        DataError: The file is missing, damaged, or its arrays are not these.
        MissingExtraError: Texts, and the package ``tokenizers`` is not installed.
    """
    path = (source.ready_folder() or Path()) / Path(table.path).expanduser()
    arrays = _read(path)
    x, y, spec = arrays["x"], arrays["y"], file_spec(table)
    if y.ndim != 1 or y.dtype.kind not in "iu" or len(x) != len(y):
        raise DataError(
            f"{path}: y: expected integers, one for each of {len(x)} samples; "
            f"got {y.dtype} {list(y.shape)}"
        )
    group = arrays.get("group", np.full(len(y), path.stem))
    if group.shape != y.shape or group.dtype.kind not in "iuU":
        raise DataError(
            f"{path}: group: expected strings or integers [{len(y)}], "
            f"got {group.dtype} {list(group.shape)}"
        )
    if table.kind == "text":
        x = _texts(path, x, spec)
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise DataError(f"{path}: x: holds values that are not finite; take those samples out")
    names, places = np.unique(group, return_inverse=True)
    try:
        return Dataset(
            x=x,
            y=y.astype(np.int64),
            group=places.astype(np.int64),
            group_names=tuple(str(name) for name in names),
            spec=spec,
        )
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _texts(path: Path, x: npt.NDArray[Any], spec: InputSpec) -> npt.NDArray[np.int64]:
    if x.dtype.kind != "U" or x.ndim != 1:
        raise DataError(f"{path}: x: expected strings [N], got {x.dtype} {list(x.shape)}")
    return token_ids(x.tolist(), spec.shape[0])


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise DataError(f"{path}: expected an .npz file, got a single array")
        with loaded as file:
            arrays = {name: file[name] for name in ("x", "y", "group") if name in file}
    except source.DAMAGED as error:
        raise DataError(f"{path}: expected an .npz file with x and y: {error}") from error
    if absent := sorted({"x", "y"} - set(arrays)):
        raise DataError(f"{path}: expected an .npz file with x and y; it has no {absent[0]}")
    if not arrays["x"].ndim:
        raise DataError(f"{path}: x: expected samples [N, ...], got a single value")
    return arrays
