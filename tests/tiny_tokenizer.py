"""A tokenizer of a few words, in the form that travels in a bundle."""

from __future__ import annotations

import json

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "play", "a", "song", "turn", "light", "on", "off")
START, END = 2, 3


def _special(name: str) -> dict:
    return {"SpecialToken": {"id": name, "type_id": 0}}


TINY_TOKENIZER = json.dumps({
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [_special("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, _special("[SEP]")],
        "pair": [],
        "special_tokens": {
            name: {"id": name, "ids": [WORDS.index(name)], "tokens": [name]}
            for name in ("[CLS]", "[SEP]")
        },
    },
    "decoder": None,
    "model": {
        "type": "WordLevel",
        "vocab": {word: number for number, word in enumerate(WORDS)},
        "unk_token": "[UNK]",
    },
}).encode()  # fmt: skip
