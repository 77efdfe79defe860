"""Texts to token ids, with the tokenizer of the pre-trained encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_ll.tokenizer import Tokenizer
from edge_ll_export.pretrained import TOKENIZER, minilm_file


def token_ids(texts: Sequence[str], length: int) -> npt.NDArray[np.int64]:
    """Token ids int64 ``[N, length]``, cut off or filled up with 0.

    Raises:
        DataError: The tokenizer's package is not installed.
        MissingExtraError: The package ``tokenizers`` is not installed.
    """
    return Tokenizer(minilm_file(TOKENIZER), length)(texts)
