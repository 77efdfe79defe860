"""Who may publish a bundle: Ed25519 signatures over a bundle's manifest (RFC 8032).

A :class:`Signer` holds a private key on the server; a :class:`TrustStore` holds the public keys
that a device or an operator accepts. Nothing else in the project touches a key. Reading and writing
key files is imported only there: a device does neither, and it costs a megabyte.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_ll.errors import TrustError

KEY_ID_BYTES = 16
SIGNATURE_BYTES = 64
SEAL_BYTES = KEY_ID_BYTES + SIGNATURE_BYTES


class Signer:
    """Signs manifests with one Ed25519 private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key: bytes = key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> Signer:
        """A signer with a fresh key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> Signer:
        """Read a private key written by :meth:`save`.

        Raises:
            TrustError: The file is missing or is not an unencrypted Ed25519 key in PEM form.
        """
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise TrustError(f"{path}: expected an Ed25519 private key, got: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise TrustError(f"{path}: expected an Ed25519 key, got {type(key).__name__}")
        return cls(key)

    @classmethod
    def load_or_create(cls, path: Path) -> Signer:
        """Read the key at ``path``, or make one there, its public half at ``path`` + ``.pub``."""
        if path.exists():
            return cls.load(path)
        signer = cls.generate()
        signer.save(path)
        return signer

    def save(self, path: Path) -> None:
        """Write the private key, readable by its owner only, and the public key beside it."""
        from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

        pem = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
        public = path.with_name(path.name + ".pub")
        public.write_text(self.public_key.hex() + "\n", encoding="ascii")

    def seal(self, payload: bytes) -> bytes:
        """Key id (16 bytes) followed by the signature (64 bytes) over ``payload``."""
        return key_id(self.public_key) + self._key.sign(payload)


class TrustStore:
    """The public keys that are accepted here."""

    def __init__(self, public_keys: Iterable[bytes]) -> None:
        try:
            self._keys = {
                key_id(raw): Ed25519PublicKey.from_public_bytes(raw) for raw in public_keys
            }
        except ValueError as error:
            raise TrustError(f"a trusted key is not an Ed25519 public key: {error}") from error
        if not self._keys:
            raise TrustError("no trusted key is configured; add the public key of your signer")

    @classmethod
    def from_hex(cls, public_keys: Iterable[str]) -> TrustStore:
        """Build from public keys in hexadecimal, as the ``.pub`` files hold them."""
        try:
            return cls([bytes.fromhex(text.strip()) for text in public_keys])
        except ValueError as error:
            raise TrustError(f"a trusted key is not hexadecimal: {error}") from error

    @classmethod
    def from_file(cls, *paths: Path) -> TrustStore:
        """Read public keys from ``.pub`` files.

        Raises:
            TrustError: A file is missing or holds no key.
        """
        try:
            return cls.from_hex([path.read_text("ascii") for path in paths])
        except (OSError, UnicodeDecodeError) as error:
            raise TrustError(f"a public key file cannot be read: {error}") from error

    def verify(self, payload: bytes, seal: bytes) -> str:
        """Check a seal made by :meth:`Signer.seal`; the signing key's id in hexadecimal.

        Raises:
            TrustError: The seal is malformed, from an unknown key, or does not match.
        """
        if len(seal) != SEAL_BYTES:
            raise TrustError(f"a seal has {SEAL_BYTES} bytes, got {len(seal)}")
        signer, signature = seal[:KEY_ID_BYTES], seal[KEY_ID_BYTES:]
        key = self._keys.get(signer)
        if key is None:
            known = ", ".join(sorted(item.hex() for item in self._keys))
            raise TrustError(f"signed by the unknown key {signer.hex()}; trusted here: {known}")
        try:
            key.verify(signature, payload)
        except InvalidSignature as error:
            raise TrustError(f"the signature by key {signer.hex()} does not match") from error
        return signer.hex()


def key_id(public_key: bytes) -> bytes:
    """The first 16 bytes of the key's sha256: short, and stable across files and machines."""
    return hashlib.sha256(public_key).digest()[:KEY_ID_BYTES]
