from __future__ import annotations

import base64
import os
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from edge_ll import trust
from edge_ll.errors import TrustError
from edge_ll.trust import Signer, TrustStore

# RFC 8032, section 7.1, test 3.
SECRET = bytes.fromhex("c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7")
PUBLIC = bytes.fromhex("fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025")
SIGNATURE = bytes.fromhex(
    "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
    "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
)
SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(SECRET))
STORE = TrustStore([PUBLIC])


def pem(key, password: bytes | None = None) -> bytes:
    encryption = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )


def unknown_curve() -> bytes:
    """A well-formed EC key on a curve that nobody knows."""
    der = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    der = der.replace(bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a8648ce3d030177"))
    body = base64.encodebytes(der)
    return b"-----BEGIN PRIVATE KEY-----\n" + body + b"-----END PRIVATE KEY-----\n"


def test_a_seal_is_the_key_id_and_the_signature_of_the_rfc():
    seal = SIGNER.seal(bytes.fromhex("af82"))
    assert seal == trust.key_id(PUBLIC) + SIGNATURE
    assert len(seal) == trust.SEAL_BYTES
    assert SIGNER.public_key == PUBLIC


def test_verify_says_who_signed():
    assert STORE.verify(b"manifest", SIGNER.seal(b"manifest")) == trust.key_id(PUBLIC).hex()


def test_one_of_several_keys_is_enough():
    other = Signer.generate()
    store = TrustStore([PUBLIC, other.public_key])
    assert store.verify(b"x", other.seal(b"x")) == trust.key_id(other.public_key).hex()
    assert store.verify(b"x", SIGNER.seal(b"x")) == trust.key_id(PUBLIC).hex()


def test_another_key_is_named_and_refused():
    other = Signer.generate()
    with pytest.raises(TrustError, match=trust.key_id(other.public_key).hex()):
        STORE.verify(b"x", other.seal(b"x"))


def test_the_id_of_a_trusted_key_does_not_help_another_key():
    forged = trust.key_id(PUBLIC) + Signer.generate().seal(b"x")[trust.KEY_ID_BYTES :]
    with pytest.raises(TrustError, match="does not match"):
        STORE.verify(b"x", forged)


@given(st.binary(min_size=1, max_size=64), st.data())
def test_any_flipped_bit_is_refused(payload, data):
    seal = SIGNER.seal(payload)
    both = bytearray(payload + seal)
    both[data.draw(st.integers(0, len(both) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(TrustError):
        STORE.verify(bytes(both[: len(payload)]), bytes(both[len(payload) :]))


@pytest.mark.parametrize("size", [0, 1, trust.KEY_ID_BYTES, trust.SEAL_BYTES - 1])
def test_a_cut_seal_is_refused(size):
    with pytest.raises(TrustError, match=f"has {trust.SEAL_BYTES} bytes, got {size}"):
        STORE.verify(b"x", SIGNER.seal(b"x")[:size])


def test_a_seal_with_something_behind_it_is_refused():
    with pytest.raises(TrustError, match="bytes"):
        STORE.verify(b"x", SIGNER.seal(b"x") + b"\0")


def test_saved_and_loaded_it_is_the_same_key(tmp_path):
    path = tmp_path / "new" / "signer.key"
    SIGNER.save(path)
    assert Signer.load(path).seal(b"x") == SIGNER.seal(b"x")
    assert TrustStore.from_file(path.with_name("signer.key.pub")).verify(b"x", SIGNER.seal(b"x"))


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_private_key_is_for_its_owner_only(tmp_path, umask):
    path = tmp_path / "signer.key"
    before = os.umask(umask)
    try:
        SIGNER.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_is_never_overwritten(tmp_path):
    path = tmp_path / "signer.key"
    SIGNER.save(path)
    with pytest.raises(FileExistsError):
        Signer.generate().save(path)
    assert Signer.load(path).public_key == PUBLIC


def test_load_or_create_is_stable(tmp_path):
    path = tmp_path / "deep" / "signer.key"
    first = Signer.load_or_create(path)
    files = {item.name: item.read_bytes() for item in path.parent.iterdir()}
    assert Signer.load_or_create(path).public_key == first.public_key
    assert {item.name: item.read_bytes() for item in path.parent.iterdir()} == files
    assert set(files) == {"signer.key", "signer.key.pub"}


def test_generated_keys_differ():
    assert Signer.generate().public_key != Signer.generate().public_key


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no key",
        pem(SIGNER._key)[:60],
        pem(SIGNER._key, b"secret"),
        pem(ec.generate_private_key(ec.SECP256R1())),
        pem(x25519.X25519PrivateKey.generate()),
        unknown_curve(),
    ],
    ids=["empty", "text", "cut", "encrypted", "ecdsa", "x25519", "unknown-curve"],
)
def test_what_is_no_plain_ed25519_key_is_refused(tmp_path, content):
    path = tmp_path / "signer.key"
    path.write_bytes(content)
    with pytest.raises(TrustError, match=r"signer\.key: expected an Ed25519"):
        Signer.load(path)


def test_a_missing_key_file_is_refused(tmp_path):
    with pytest.raises(TrustError, match="No such file"):
        Signer.load(tmp_path / "absent")


@pytest.mark.parametrize("keys", [[b""], [PUBLIC[:-1]], [PUBLIC, PUBLIC + b"\0"]])
def test_what_is_no_public_key_is_refused(keys):
    with pytest.raises(TrustError, match="is not an Ed25519 public key"):
        TrustStore(keys)


def test_an_empty_store_is_refused():
    with pytest.raises(TrustError, match="no trusted key"):
        TrustStore([])


@pytest.mark.parametrize("text", ["xyz", PUBLIC.hex() + "0", "é" * 64])
def test_what_is_not_hexadecimal_is_refused(text):
    with pytest.raises(TrustError, match="is not hexadecimal"):
        TrustStore.from_hex([text])


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"zz", b""])
def test_a_bad_public_key_file_is_refused(tmp_path, content):
    path = tmp_path / "signer.pub"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TrustError):
        TrustStore.from_file(path)
