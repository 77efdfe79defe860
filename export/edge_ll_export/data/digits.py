"""Handwritten digits that come with scikit-learn: 1,797 images of 8x8, no download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (CC BY 4.0).
"""

from __future__ import annotations

import numpy as np

from edge_ll.errors import MissingExtraError
from edge_ll_export.data.dataset import Dataset, InputSpec

SPEC = InputSpec(kind="image", shape=(1, 8, 8), dtype="uint8", full_scale=16.0)


def load_digits() -> Dataset:
    """The images as uint8 ``[1797, 1, 8, 8]`` with values 0 to 16; one group, "digits".

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets  # noqa: PLC0415 - only this data set needs it
    except ImportError as error:
        raise MissingExtraError("the digits data set", "export") from error
    bunch = datasets.load_digits()
    y = np.asarray(bunch.target, np.int64)
    return Dataset(
        x=np.asarray(bunch.images, np.uint8)[:, None],
        y=y,
        group=np.zeros_like(y),
        group_names=("digits",),
        spec=SPEC,
    )
