from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from functools import cache

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_ll import bundle as bundle_module
from edge_ll.bundle import MANIFEST, SEAL, THETA, Bundle, write_bundle
from edge_ll.errors import BundleError, EdgeLLError, TrustError
from edge_ll.manifest import (
    ArraySpec,
    DriftDefaults,
    FileEntry,
    LearnerDefaults,
    Manifest,
    Provenance,
    TensorSpec,
    ThetaEntry,
)
from edge_ll.novelty import NoveltyReference
from edge_ll.trust import Signer, TrustStore

SIGNER = Signer.generate()
TRUST = TrustStore([SIGNER.public_key])
ARRAYS = {
    "anchor_latents": np.arange(-6, 6, dtype=np.int8).reshape(2, 3, 2),
    "anchor_labels": np.array([0, 1], "<i8"),
    "novelty_center": np.arange(6, dtype="<f4"),
    "novelty_projection": np.ones((6, 2), "<f4"),
    "novelty_class_means": np.zeros((2, 2), "<f4"),
    "novelty_scores": np.array([1, 2, 3], "<f4"),
}
FILES = {THETA: np.array([0.5, -1.5, 2.0], "<f4").tobytes(), "recipe.json": b"{}"} | {
    f"{name}.bin": array.tobytes() for name, array in ARRAYS.items()
}
GRAPH = b"\x3a\x00"  # the smallest ONNX model: an empty graph
EVIL = b"\x3a\x0a\x0a\x08\x3a\x06custom"  # one node of the domain "custom"


def manifest(**changes) -> Manifest:
    vector = TensorSpec(shape=(6,), dtype="float32")
    fields = {
        "name": "tiny",
        "version": 1,
        "input": vector,
        "latent": vector,
        "labels": ("a", "b"),
        "base_classes": (0,),
        "known_classes": (0,),
        "theta": (ThetaEntry(name="w", offset=0, shape=(3,)),),
        "engines": ("step-graph",),
        "learner": LearnerDefaults(
            optimizer="sgd", learning_rate=0.1, weight_decay=0.0, clip_norm=1.0, batch_new=1,
            batch_replay=1, steps_per_batch=1, buffer_entries=8,
        ),
        "drift": DriftDefaults(average_run_length=100.0),
        "anchor_groups": {"base": (0,), "new": (1,)},
        "arrays": {
            name: ArraySpec(file=f"{name}.bin", dtype=str(array.dtype), shape=array.shape)
            for name, array in ARRAYS.items()
        },
        "files": {},
        "provenance": Provenance(recipe="r", created_at_s=0.0),
    }  # fmt: skip
    return Manifest(**(fields | changes))


def listed(files=FILES, **changes) -> bytes:
    """The manifest's bytes with the right hashes."""
    entries = {
        name: FileEntry(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        for name, data in sorted(files.items())
    }
    return manifest(**{"files": entries} | changes).encode()


def archive(entries, *, kind=zipfile.ZIP_STORED) -> bytes:
    """A ZIP file of any entries, in their order, even twice."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", kind) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in entries:
            file.writestr(zipfile.ZipInfo(name), data, kind)
    return out.getvalue()


def sealed(text: bytes, files, *, signer=SIGNER):
    return [(SEAL, signer.seal(text)), (MANIFEST, text), *files.items()]


@cache
def good() -> bytes:
    return archive(sealed(listed(), dict(sorted(FILES.items()))))


def opened(data: bytes) -> Bundle:
    return Bundle.open(data, TRUST)


@pytest.fixture
def path(tmp_path):
    target = tmp_path / "new" / "tiny.bundle"
    write_bundle(target, manifest(), FILES, SIGNER)
    return target


def test_a_bundle_survives_a_round_trip(path):
    written = write_bundle(path, manifest(), FILES, SIGNER)
    for source in (path, path.read_bytes()):
        bundle = Bundle.open(source, TRUST)
        assert bundle.manifest == written
        assert {name: bundle.read(name) for name in FILES} == FILES
        assert bundle.size_bytes == path.stat().st_size
        assert bundle.digest == hashlib.sha256(path.read_bytes()).hexdigest()
        assert bundle.key_id == SIGNER.seal(b"")[:16].hex()
    assert list(written.files) == sorted(FILES)


def test_arrays_come_back_in_their_dtype_and_shape(path):
    bundle = Bundle.open(path, TRUST)
    for name, array in ARRAYS.items():
        back = bundle.array(name)
        assert back.dtype == array.dtype
        assert np.array_equal(back, array)
        with pytest.raises(ValueError, match="read-only"):
            back[...] = 0
    assert bundle.theta().tolist() == [0.5, -1.5, 2.0]
    assert bundle.theta().dtype == np.float32


def test_the_novelty_reference_is_complete(path):
    reference = Bundle.open(path, TRUST).novelty()
    assert isinstance(reference, NoveltyReference)
    for field in NoveltyReference._fields:
        assert np.array_equal(getattr(reference, field), ARRAYS[f"novelty_{field}"])


def test_the_same_input_gives_the_same_bytes(tmp_path):
    turned = dict(reversed(FILES.items()))
    for name, files in (("a", FILES), ("b", turned)):
        write_bundle(tmp_path / name, manifest(), files, SIGNER)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == good()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a", "b"]


def test_unknown_fields_are_signed_and_kept(path):
    write_bundle(path, manifest(unknown={"later": 1}), FILES, SIGNER)
    assert Bundle.open(path, TRUST).manifest.unknown == {"later": 1}


def held(bundle: Bundle):
    return bundle.manifest, {name: bundle.read(name) for name in bundle.manifest.files}


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_an_altered_byte_never_alters_what_is_held(data):
    broken = bytearray(good())
    at = data.draw(
        st.integers(0, len(broken) - 1) | st.integers(len(broken) - 900, len(broken) - 1)
    )
    broken[at] = data.draw(st.integers(0, 255))
    try:
        bundle = opened(bytes(broken))
    except (BundleError, TrustError):
        return
    assert held(bundle) == held(opened(good()))


@pytest.mark.parametrize("mask", [1, 8, 0x80, 0xFF])
def test_no_byte_of_the_directory_raises_anything_else(mask):
    """All bytes behind the files' data, one at a time."""
    start = good().index(b"PK\x01\x02")
    for at in range(start, len(good())):
        broken = bytearray(good())
        broken[at] ^= mask
        try:
            bundle = opened(bytes(broken))
        except (BundleError, TrustError):
            continue
        assert bundle.read(THETA) == FILES[THETA]


def test_every_truncation_is_refused():
    for size in range(len(good())):
        with pytest.raises((BundleError, TrustError)):
            opened(good()[:size])


def tampered(name: str, data: bytes) -> dict[str, bytes]:
    return {**FILES, name: data}


def without(name: str) -> dict[str, bytes]:
    return {key: value for key, value in FILES.items() if key != name}


HEAD = sealed(listed(), {})
ACCENTED = {**FILES, "é.bin": b"x"}
REFUSED = [
    ("empty", b"", BundleError, "damaged"),
    ("no archive", b"PK" + bytes(100), BundleError, "damaged"),
    ("no manifest", archive([HEAD[0], *FILES.items()]), BundleError, "manifest.json is missing"),
    ("no seal", archive([HEAD[1], *FILES.items()]), BundleError, "manifest.seal is missing"),
    ("missing file", archive([*HEAD, *without(THETA).items()]), BundleError, "missing: theta.f32"),
    ("extra file", archive([*HEAD, *FILES.items(), ("x", b"")]), BundleError, "not listed.*: x"),
    ("a file twice", archive([*HEAD, *FILES.items(), (THETA, b"")]), BundleError, "twice"),
    ("a manifest twice", archive([*HEAD, HEAD[1], *FILES.items()]), BundleError, "twice"),
    ("compressed", archive([*HEAD, *FILES.items()], kind=zipfile.ZIP_DEFLATED), BundleError,
     "compressed"),
    ("wrong hash", archive([*HEAD, *tampered(THETA, b"x" * 12).items()]), BundleError, "sha256"),
    ("wrong size", archive([*HEAD, *tampered(THETA, b"x" * 13).items()]), BundleError,
     "expected 12 bytes, got 13"),
    ("other manifest", archive([HEAD[0], (MANIFEST, listed(version=2)), *FILES.items()]),
     TrustError, "does not match"),
    ("other signer", archive(sealed(listed(), FILES, signer=Signer.generate())), TrustError,
     "unknown key"),
    ("cut seal", archive([(SEAL, HEAD[0][1][:-1]), HEAD[1], *FILES.items()]), TrustError,
     "got 79"),
    ("long seal", archive([(SEAL, HEAD[0][1] + b"x"), HEAD[1], *FILES.items()]), BundleError,
     "at most 80 bytes, got 81"),
    ("signed nonsense", archive(sealed(b"[]", FILES)), BundleError, "format None"),
    ("signed format 3", archive(sealed(listed().replace(b'"format": 2', b'"format": 3'), FILES)),
     BundleError, "format 3"),
    ("undecodable name",
     archive(sealed(listed(ACCENTED), ACCENTED)).replace("é.bin".encode(), b"\xff\xfe.bin"),
     BundleError, "."),
    ("unsafe graph", archive(sealed(listed({**FILES, "step.onnx": EVIL}),
                                    {**FILES, "step.onnx": EVIL})), BundleError, "custom"),
    ("no graph", archive(sealed(listed({**FILES, "tail.onnx": b""}),
                                {**FILES, "tail.onnx": b""})), BundleError, "no graph"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "error", "expected"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_what_is_wrong_is_refused(data, error, expected, tmp_path):
    target = tmp_path / "x.bundle"
    target.write_bytes(data)
    with pytest.raises(error, match=expected):
        opened(data)
    with pytest.raises(error, match=expected):
        Bundle.open(target, TRUST)


@pytest.mark.parametrize(
    ("data", "expected"),
    [(archive([]), "manifest.json is missing"), (b"", "the bundle is damaged")],
)
def test_a_refusal_names_the_file(tmp_path, data, expected):
    (tmp_path / "x.bundle").write_bytes(data)
    with pytest.raises(BundleError, match=rf"x\.bundle: {expected}"):
        Bundle.open(tmp_path / "x.bundle", TRUST)


@pytest.mark.parametrize("name", ["absent", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name):
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / name, TRUST)


@pytest.mark.parametrize(
    ("limit", "value", "expected"),
    [
        ("MAX_MANIFEST_BYTES", 99, "manifest.json: expected at most 99 bytes"),
        ("MAX_FILE_BYTES", 47, "is larger than 47 bytes"),
        ("MAX_FILES", 7, "expected at most 7 files"),
    ],
)
def test_limits_hold(monkeypatch, limit, value, expected):
    monkeypatch.setattr(bundle_module, limit, value)
    with pytest.raises(BundleError, match=expected):
        opened(good())


def test_a_huge_declared_size_is_refused_before_anything_is_read():
    data = bytearray(good())
    at = data.index(b"PK\x01\x02")  # the seal's entry; its size field lies 24 bytes in
    data[at + 24 : at + 28] = (0x7FFFFFFF).to_bytes(4, "little")
    with pytest.raises(BundleError, match="larger than"):
        opened(bytes(data))


@pytest.mark.parametrize(
    "entries",
    [
        sealed(b"not even JSON", FILES, signer=Signer.generate()),
        [(SEAL, b""), (MANIFEST, listed()), *FILES.items()],
        [(SEAL, HEAD[0][1]), (MANIFEST, listed(version=2)), *FILES.items()],
    ],
    ids=["other signer", "no signature", "other manifest"],
)
def test_nothing_is_parsed_before_the_signature_was_checked(monkeypatch, entries):
    def parsed(*_, **__):
        raise AssertionError("parsed before the signature was checked")

    monkeypatch.setattr(Manifest, "decode", parsed)
    monkeypatch.setattr(msgspec.json, "decode", parsed)
    monkeypatch.setattr(bundle_module, "check_onnx", parsed)
    with pytest.raises(TrustError):
        opened(archive(entries))


def test_no_graph_is_looked_at_before_its_hash_was_checked(monkeypatch):
    def looked(*_, **__):
        raise AssertionError("parsed before the hash was checked")

    monkeypatch.setattr(bundle_module, "check_onnx", looked)
    text = listed({**FILES, "step.onnx": GRAPH})
    with pytest.raises(BundleError, match="sha256"):
        opened(archive(sealed(text, {**FILES, "step.onnx": b"\x3a\x01"})))


@pytest.mark.parametrize(
    ("name", "passes"),
    [("step.onnx", False), ("ort_training/x.onnx", True), ("ort_training.onnx", False)],
)
def test_only_training_artifacts_may_use_the_runtimes_own_operators(name, passes):
    files = {**FILES, name: EVIL.replace(b"\x3a\x06custom", b"\x3a\x0dcom.microsoft")}
    files[name] = b"\x3a\x11\x0a\x0f" + files[name][4:]
    data = archive(sealed(listed(files), files))
    if passes:
        assert opened(data).read(name) == files[name]
    else:
        with pytest.raises(BundleError, match=r"com\.microsoft"):
            opened(data)


@pytest.mark.parametrize("name", ["../out.bin", "/out.bin", "a/../../out.bin", "..\\out.bin"])
def test_names_that_climb_reach_no_file(tmp_path, monkeypatch, name):
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "out.bin").write_bytes(b"outside")
    monkeypatch.chdir(inner)
    files = {**FILES, name: b"inside"}
    data = archive(sealed(listed(files), files))
    with pytest.raises(BundleError, match=r"out\.bin"):
        opened(data).read("other/" + name)
    try:
        assert opened(data).read(name) == b"inside"
    except BundleError as error:
        assert "out.bin" in str(error)  # noqa: PT017 -- refusing such a name is as good
    assert (tmp_path / "out.bin").read_bytes() == b"outside"
    assert list(inner.iterdir()) == []


def test_what_a_bundle_does_not_hold_is_listed(path):
    bundle = Bundle.open(path, TRUST)
    with pytest.raises(BundleError, match=r"tiny: holds no 'x'; it holds .*theta\.f32"):
        bundle.read("x")
    with pytest.raises(BundleError, match="holds no array 'x'; it holds anchor_labels"):
        bundle.array("x")
    for name in (MANIFEST, SEAL):
        with pytest.raises(BundleError, match="holds no"):
            bundle.read(name)


def swapped(name: str = THETA, *, kind=zipfile.ZIP_STORED, data: bytes = FILES[THETA]) -> bytes:
    return archive([*HEAD, *tampered(name, data).items()], kind=kind)


def damaged(kind: int) -> bytes:
    """An entry whose compressed bytes are nonsense."""
    data = bytearray(swapped(kind=kind, data=bytes(range(200)) * 9))
    at = data.index(THETA.encode()) + len(THETA) + (4 if kind == zipfile.ZIP_LZMA else 0)
    data[at : at + 8] = b"\xff" * 8
    return bytes(data)


def flagged(at: int, value: int) -> bytes:
    """The entry of θ in the central directory with one byte changed."""
    data = bytearray(good())
    entry = data.rindex(THETA.encode()) - 46
    assert data[entry : entry + 4] == b"PK\x01\x02"
    data[entry + at] = value
    return bytes(data)


SWAPS = [
    ("gone", None),
    ("emptied", b""),
    ("cut off", good()[:-30]),
    ("other bytes", swapped(data=b"x" * 12)),
    ("longer", swapped(data=FILES[THETA] + b"x")),
    ("entry gone", archive([*HEAD, *without(THETA).items()])),
    ("other bytes, deflated", swapped(kind=zipfile.ZIP_DEFLATED, data=b"x" * 12)),
    ("damaged deflate", damaged(zipfile.ZIP_DEFLATED)),
    ("damaged lzma", damaged(zipfile.ZIP_LZMA)),
    ("encrypted", flagged(8, 1)),
    ("unknown compression", flagged(10, 99)),
    ("later ZIP version", flagged(6, 200)),
    ("negative offset", good()[:-6] + b"\xff\xff\xff\x7f" + good()[-2:]),
]


@pytest.mark.parametrize("data", [row[1] for row in SWAPS], ids=[row[0] for row in SWAPS])
def test_a_file_swapped_after_opening_is_refused(path, data):
    bundle = Bundle.open(path, TRUST)
    assert bundle.read(THETA) == FILES[THETA]
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    with pytest.raises(BundleError):
        bundle.read(THETA)


def test_a_bomb_swapped_in_after_opening_is_not_inflated(path, monkeypatch):
    bundle = Bundle.open(path, TRUST)
    path.write_bytes(swapped(kind=zipfile.ZIP_DEFLATED, data=bytes(20 << 20)))
    sizes = []
    real = hashlib.sha256

    def watched(data=b""):
        sizes.append(len(data))
        return real(data)

    monkeypatch.setattr(bundle_module.hashlib, "sha256", watched)
    with pytest.raises(BundleError):
        bundle.read(THETA)
    assert max(sizes, default=0) <= len(FILES[THETA])


@pytest.mark.parametrize(
    ("name", "data"),
    [("anchor_labels.bin", bytes(8)), ("anchor_labels.bin", bytes(24)),
     ("anchor_labels.bin", bytes(15)), ("anchor_labels.bin", b""),
     ("novelty_center.bin", bytes(25))],
)  # fmt: skip
def test_an_array_of_the_wrong_size_is_refused(name, data):
    files = tampered(name, data)
    bundle = opened(archive(sealed(listed(files), files)))
    with pytest.raises(BundleError, match=name.removesuffix(".bin")):
        bundle.array(name.removesuffix(".bin"))


@pytest.mark.parametrize(
    "theta",
    [[1, 2], [1, 2, 3, 4], [], [1, np.nan, 3], [1, 2, np.inf], [-np.inf, 2, 3], b"12345", b"123"],
)
def test_a_wrong_theta_is_refused(theta):
    files = tampered(THETA, theta if isinstance(theta, bytes) else np.array(theta, "<f4").tobytes())
    bundle = opened(archive(sealed(listed(files), files)))
    with pytest.raises(BundleError, match=r"theta\.f32: expected 3 finite values"):
        bundle.theta()


def test_what_open_raises_stays_what_it_was(monkeypatch):
    """An error of the project keeps its type, with its cause."""
    with pytest.raises(TrustError) as caught:
        opened(archive(sealed(listed(), FILES, signer=Signer.generate())))
    assert isinstance(caught.value.__cause__, EdgeLLError)
