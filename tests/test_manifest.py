from __future__ import annotations

import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_ll.errors import BundleError
from edge_ll.manifest import FORMAT, OLDEST_FORMAT, LossTerms, Manifest

DIGEST = "0123456789abcdef" * 4


def plain_manifest() -> dict:
    """Every field of a manifest, as JSON holds it."""
    return {
        "format": FORMAT,
        "name": "kws",
        "version": 3,
        "input": {"shape": [32], "dtype": "int64"},
        "latent": {"shape": [4, 2], "dtype": "float32"},
        "labels": ["yes", "no", "free"],
        "base_classes": [0],
        "known_classes": [0, 1],
        "theta": [
            {"name": "weight", "offset": 0, "shape": [3, 8]},
            {"name": "bias", "offset": 24, "shape": [3]},
            {"name": "gain", "offset": 27, "shape": []},
        ],
        "engines": ["step-graph", "ort-training"],
        "learner": {
            "optimizer": "adamw",
            "learning_rate": 0.001,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
            "momentum": 0.5,
            "batch_new": 4,
            "batch_replay": 12,
            "steps_per_batch": 2,
            "buffer_entries": 100,
            "loss": {"target": "kl", "temperature": 3.0, "anchor": True, "projection": True},
        },
        "drift": {"average_run_length": 1000.0, "tolerance": 0.1},
        "anchor_groups": {"base": [0], "new": [1, 2]},
        "arrays": {"anchor_latents": {"file": "anchors.i8", "dtype": "int8", "shape": [2, 4, 2]}},
        "files": {"anchors.i8": {"sha256": DIGEST, "size_bytes": 16}},
        "provenance": {
            "recipe": "recipe.toml",
            "created_at_s": 1.5,
            "versions": {"torch": "2"},
            "metrics": {"accuracy": 0.9},
            "parent": DIGEST,
            "merged_from": ["a", "b"],
        },
        "backbone_precision": "int8",
        "tokenizer": {"file": "anchors.i8", "max_length": 32},
    }


def decode(**changes) -> Manifest:
    return Manifest.decode(json.dumps(plain_manifest() | changes).encode())


def merged(section: str, **changes) -> dict:
    return {section: plain_manifest()[section] | changes}


def test_a_manifest_survives_a_round_trip():
    manifest = decode()
    assert json.loads(manifest.encode()) == plain_manifest()
    assert Manifest.decode(manifest.encode()) == manifest
    assert manifest.unknown == {}


def test_what_follows_from_the_fields():
    manifest = decode()
    assert manifest.capacity == 3
    assert manifest.theta_size == 28
    assert [entry.size for entry in manifest.theta] == [24, 3, 1]
    assert manifest.input.size == 32
    assert manifest.latent.size == 8


def test_optional_fields_have_defaults():
    raw = plain_manifest()
    del raw["learner"]["momentum"], raw["learner"]["loss"], raw["drift"]["tolerance"]
    del raw["backbone_precision"], raw["tokenizer"]
    raw["provenance"] = {"recipe": "r", "created_at_s": 0}
    manifest = Manifest.decode(json.dumps(raw).encode())
    assert (manifest.learner.momentum, manifest.drift.tolerance) == (0.9, 0.0)
    assert manifest.learner.loss == LossTerms(target="mse", anchor=False, projection=False)
    assert manifest.provenance.parent is None
    assert manifest.backbone_precision == "float32"
    assert manifest.tokenizer is None
    assert Manifest.decode(manifest.encode()) == manifest


LATER = [
    ("at the top", {"later": {"deep": [1, None]}, "null": None}, ("later",)),
    ("in a table", merged("learner", later=[1, 2]), ("learner", "later")),
    ("in several", merged("drift", later=1) | merged("provenance", later="x"), ("drift", "later")),
    ("in an optional table", {"tokenizer": {"file": "anchors.i8", "max_length": 32, "later": 1}},
     ("tokenizer", "later")),
    ("in a list", {"theta": [{"name": "w", "offset": 0, "shape": [2], "later": 1}]},
     ("theta", 0, "later")),
    ("in a named table",
     {"arrays": {"x": {"file": "anchors.i8", "dtype": "int8", "shape": [16], "later": 1}}},
     ("arrays", "x", "later")),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "path"), [row[1:] for row in LATER], ids=[r[0] for r in LATER])
def test_fields_of_a_later_version_survive(changes, path):
    raw = plain_manifest() | changes
    once = Manifest.decode(json.dumps(raw).encode())
    again = Manifest.decode(once.encode())
    assert again == once
    written, expected = json.loads(again.encode()), raw
    for step in path:
        written, expected = written[step], expected[step]
    assert written == expected
    assert once.unknown


@given(st.dictionaries(st.sampled_from("abc"), st.integers() | st.none() | st.text(), min_size=1))
def test_unknown_fields_never_shadow_known_ones(extra):
    small = {key: value for key, value in extra.items() if not isinstance(value, int)}
    manifest = decode(**small)
    assert manifest.unknown == small
    assert json.loads(manifest.encode()) == plain_manifest() | small


def test_changing_a_known_field_keeps_the_unknown_ones():
    manifest = msgspec.structs.replace(decode(later=1, **merged("learner", later=2)), version=4)
    written = json.loads(manifest.encode())
    assert (written["version"], written["later"], written["learner"]["later"]) == (4, 1, 2)


@pytest.mark.parametrize("value", [{"name": "other", "version": 99}, 5])
def test_a_field_called_unknown_does_not_smuggle_values_in(value):
    manifest = decode(unknown=value)
    assert manifest.unknown == {}
    assert json.loads(manifest.encode()) == plain_manifest()


@pytest.mark.parametrize(
    "version", [FORMAT + 1, OLDEST_FORMAT - 1, 0, -1, "2", True, 2.0, None, [2]]
)
def test_other_formats_are_refused(version):
    with pytest.raises(BundleError, match="format"):
        decode(format=version)


def test_a_manifest_without_a_format_is_refused():
    raw = plain_manifest()
    del raw["format"]
    with pytest.raises(BundleError, match="format None"):
        Manifest.decode(json.dumps(raw).encode())


def entry(name, offset, *shape):
    return {"name": name, "offset": offset, "shape": shape}


BROKEN = [
    ("theta starts late", {"theta": [entry("w", 1, 2)]}, "theta: w at 1, expected 0"),
    ("theta gap", {"theta": [entry("w", 0, 2), entry("b", 3, 1)]}, "b at 3, expected 2"),
    ("theta overlap", {"theta": [entry("w", 0, 2), entry("b", 1, 1)]}, "b at 1, expected 2"),
    ("theta order", {"theta": [entry("b", 2, 1), entry("w", 0, 2)]}, "b at 2, expected 0"),
    ("theta axis of zero", {"theta": [entry("w", 0, 0)]}, ">= 1"),
    ("base class past capacity", {"base_classes": [3]}, "class 3 is past the capacity 3"),
    ("known class past capacity", {"known_classes": [0, 7]}, "class 7 is past"),
    ("anchor class past capacity", {"anchor_groups": {"x": [1, 3]}}, "class 3 is past"),
    ("negative class", {"known_classes": [-1]}, ">= 0"),
    ("unlisted array file", {"files": {}}, "not listed: anchors.i8"),
    ("unknown engine", {"engines": ["torch"]}, "Invalid enum value 'torch'"),
    ("unknown precision", {"backbone_precision": "int4"}, "Invalid enum value 'int4'"),
    ("version zero", {"version": 0}, ">= 1"),
    ("name with a slash", {"name": "../kws"}, "name"),
    ("empty name", {"name": ""}, "name"),
    ("long name", {"name": "k" * 65}, "name"),
    ("name with a line feed", {"name": "kws\n"}, "name"),
    ("short hash", {"files": {"anchors.i8": {"sha256": "0" * 63, "size_bytes": 1}}}, "sha256"),
    ("hash with a line feed",
     {"files": {"anchors.i8": {"sha256": DIGEST + "\n", "size_bytes": 1}}}, "sha256"),
    ("upper-case hash",
     {"files": {"anchors.i8": {"sha256": DIGEST.upper(), "size_bytes": 1}}}, "sha256"),
    ("negative size", {"files": {"anchors.i8": {"sha256": DIGEST, "size_bytes": -1}}}, ">= 0"),
    ("unknown dtype", {"input": {"shape": [1], "dtype": "object"}}, "dtype"),
    ("empty axis", {"input": {"shape": [0], "dtype": "float32"}}, "shape"),
    ("rate of zero", merged("learner", learning_rate=0), "learning_rate"),
    ("momentum of one", merged("learner", momentum=1), "momentum"),
    ("unknown target", merged("learner", loss={"target": "cosine"}), "target"),
    ("temperature of zero", merged("learner", loss={"temperature": 0}), "temperature"),
    ("run length of one", merged("drift", average_run_length=1), "average_run_length"),
    ("no labels", {"labels": None}, "labels"),
    ("tokenizer of another length",
     merged("tokenizer", max_length=16), r"gives int64 \[16\], but the input is int64 \[32\]"),
    ("tokenizer for waveforms",
     {"input": {"shape": [32], "dtype": "int16"}}, r"but the input is int16 \[32\]"),
    ("unlisted tokenizer", merged("tokenizer", file="absent.json"), "absent.json is not listed"),
    ("tokenizer without a file", {"tokenizer": {"max_length": 32}}, "file"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN]
)
def test_broken_rules_are_refused(changes, expected):
    with pytest.raises(BundleError, match=expected):
        decode(**changes)


OPTIONAL = {"format", "backbone_precision", "tokenizer"}


@pytest.mark.parametrize("key", [key for key in plain_manifest() if key not in OPTIONAL])
def test_every_field_is_required(key):
    raw = plain_manifest()
    del raw[key]
    with pytest.raises(BundleError, match=key):
        Manifest.decode(json.dumps(raw).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"1", b"null", b'"x"', b"\xff", b'{"\xff": 1}', b'{"format": NaN}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"format": 1' + b"0" * 9999 + b"}",
    ],
    ids=lambda data: repr(data[:12]),
)  # fmt: skip
def test_what_is_no_manifest_is_refused(data):
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Manifest.decode(data)


@given(st.binary(max_size=100))
def test_random_bytes_are_refused(data):
    with pytest.raises(BundleError):
        Manifest.decode(data)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_hold_is_not_written(value):
    """Or it is written so that it can be read: a bundle that nobody can open helps nobody."""
    manifest = decode()
    provenance = msgspec.structs.replace(manifest.provenance, metrics={"accuracy": value})
    try:
        written = msgspec.structs.replace(manifest, provenance=provenance).encode()
    except (BundleError, ValueError):
        return
    Manifest.decode(written)
