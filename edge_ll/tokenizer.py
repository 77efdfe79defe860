"""Texts to token ids, as a bundle's backbone takes them.

The tokenizer is data: a ``tokenizer.json`` that travels in the bundle, run by the package
``tokenizers``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_ll.bundle import Bundle
from edge_ll.errors import BundleError, MissingExtraError, SampleError

PADDING = 0
"""The id that fills a text up to the fixed length."""


class Tokenizer:
    """A tokenizer with a fixed length: what is longer is cut off, what is shorter is filled up.

    Args:
        definition: Content of a ``tokenizer.json``.
        length: Token ids for each text, those that mark its start and end included.

    Raises:
        BundleError: The definition cannot be read.
        MissingExtraError: The package ``tokenizers`` is not installed.
    """

    def __init__(self, definition: bytes, length: int) -> None:
        try:
            import tokenizers  # noqa: PLC0415 - needed for text alone
        except ImportError as error:
            raise MissingExtraError("turning text into token ids", "text") from error
        self._length = length
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(definition)
            self._tokenizer.enable_truncation(length)
            self._tokenizer.enable_padding(length=length, pad_id=PADDING)
        except Exception as error:  # the package's exceptions share no base
            raise BundleError(f"the tokenizer cannot be read: {error}") from error

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Token ids int64 ``[N, length]``; the same text always gives the same ids.

        Raises:
            SampleError: A text is no valid Unicode.
        """
        try:
            # One by one: encode_batch would start a thread on each core, on devices too.
            rows = [self._tokenizer.encode(text).ids for text in texts]
        except Exception as error:  # the package's exceptions share no base
            raise SampleError(f"text: cannot be turned into token ids: {error}") from error
        return np.array(rows, np.int64).reshape(len(rows), self._length)


def bundle_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a bundle whose backbone takes text.

    Raises:
        BundleError: The bundle has none, or it cannot be read.
        MissingExtraError: The package ``tokenizers`` is not installed.
    """
    spec = bundle.manifest.tokenizer
    if spec is None:
        takes = f"{bundle.manifest.input.dtype} {list(bundle.manifest.input.shape)}"
        raise BundleError(f"{bundle.manifest.name} takes no text; it takes {takes}")
    return Tokenizer(bundle.read(spec.file), spec.max_length)
