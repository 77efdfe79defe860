"""Text to token ids, as a device does it."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from edge_ll.errors import BundleError, MissingExtraError, SampleError
from edge_ll.manifest import TensorSpec, TokenizerSpec
from edge_ll.tokenizer import PADDING, Tokenizer, bundle_tokenizer
from tests.tiny_bundle import write_tiny_bundle
from tests.tiny_tokenizer import END, START, TINY_TOKENIZER, WORDS


@pytest.fixture
def tokenizer():
    pytest.importorskip("tokenizers")
    return Tokenizer(TINY_TOKENIZER, 6)


def test_texts_are_cut_off_and_filled_up(tokenizer):
    ids = tokenizer(["Turn light ON", "play a song play a song", "", "jazz"])
    turn, light, on, play = (WORDS.index(word) for word in ("turn", "light", "on", "play"))
    assert ids.dtype == np.int64
    assert ids.shape == (4, 6)
    assert ids[0].tolist() == [START, turn, light, on, END, PADDING]
    assert ids[1].tolist() == [START, play, 5, 6, play, END]
    assert ids[2].tolist() == [START, END, *[PADDING] * 4]
    assert ids[3, 1] == WORDS.index("[UNK]")
    assert tokenizer([]).shape == (0, 6)
    assert (tokenizer(["play"]) == tokenizer(["PLAY"])).all()


def test_text_that_is_no_unicode_is_refused(tokenizer):
    with pytest.raises(SampleError, match="text"):
        tokenizer(["play \udcff"])


@pytest.mark.parametrize("definition", [b"", b"{}", b"\xff", b'{"model": {"type": "None"}}'])
def test_what_is_no_tokenizer_is_refused(definition):
    pytest.importorskip("tokenizers")
    with pytest.raises(BundleError, match="the tokenizer cannot be read"):
        Tokenizer(definition, 6)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r'pip install "edge-ll\[text\]"'):
        Tokenizer(TINY_TOKENIZER, 6)


def test_it_travels_in_the_bundle(tmp_path, tokenizer):
    bundle = write_tiny_bundle(
        tmp_path / "text.bundle",
        files={"tokenizer.json": TINY_TOKENIZER},
        input=TensorSpec(shape=(6,), dtype="int64"),
        tokenizer=TokenizerSpec(file="tokenizer.json", max_length=6),
    )
    texts = ["play a song", "off"]
    assert (bundle_tokenizer(bundle)(texts) == tokenizer(texts)).all()


def test_a_bundle_that_takes_no_text_says_what_it_takes(tmp_path):
    with pytest.raises(BundleError, match="toy takes no text; it takes float32"):
        bundle_tokenizer(write_tiny_bundle(tmp_path / "toy.bundle"))
