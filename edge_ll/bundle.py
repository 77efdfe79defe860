"""A bundle: one file with everything that a device needs to run and to train a student.

The container is a ZIP archive whose entries are stored, not compressed: ``manifest.seal`` (a
signature), ``manifest.json`` (see :mod:`edge_ll.manifest`) and the files it lists. Opening checks
the signature before the manifest is parsed, and every size and hash before a file is read.
Entries are read by name and never extracted to a path.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from edge_ll.errors import BundleError, EdgeLLError
from edge_ll.manifest import FileEntry, Manifest
from edge_ll.novelty import NoveltyReference
from edge_ll.onnx_scan import check_onnx
from edge_ll.trust import SEAL_BYTES, Signer, TrustStore

MANIFEST, SEAL, RECIPE = "manifest.json", "manifest.seal", "recipe.json"
BACKBONE, TAIL, THETA = "backbone.onnx", "tail.onnx", "theta.f32"
STEP, PROJECTED_STEP = "step.onnx", "step_projected.onnx"
ORT_TRAINING, TOKENIZER = "ort_training/", "tokenizer.json"

MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 30
MAX_FILES = 64

# What zipfile raises on bytes that somebody has tampered with.
_ZIP_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    RuntimeError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
_READ_BYTES = 1 << 20
_PLAIN_DOMAINS = ("", "ai.onnx")
_TRAINING_DOMAINS = (*_PLAIN_DOMAINS, "com.microsoft", "ai.onnx.training")


class Bundle:
    """An opened bundle whose every byte was verified.

    Attributes:
        manifest: What it says about itself.
        digest: sha256 of the whole file, hexadecimal: the bundle's identity.
        size_bytes: Size of the whole file.
        key_id: Who signed it.
    """

    def __init__(
        self, source: Path | bytes, manifest: Manifest, digest: str, size_bytes: int, key_id: str
    ) -> None:
        self._source = source
        self.manifest = manifest
        self.digest = digest
        self.size_bytes = size_bytes
        self.key_id = key_id

    @classmethod
    def open(cls, source: Path | bytes, trust: TrustStore) -> Bundle:
        """Verify a bundle and open it.

        Args:
            source: A file's path, or the file's bytes.
            trust: The keys that may have signed it.

        Raises:
            BundleError: The file is damaged, incomplete, of an unknown format or unsafe.
            TrustError: It is not signed by a trusted key.
        """
        where = f"{source}: " if isinstance(source, Path) else ""
        try:
            with _reading(source) as file:
                digest, size_bytes = _digest(file)
                with zipfile.ZipFile(file) as archive:
                    entries = _entries(archive)
                    text = _bounded(archive, entries, MANIFEST, MAX_MANIFEST_BYTES)
                    key_id = trust.verify(text, _bounded(archive, entries, SEAL, SEAL_BYTES))
                    manifest = Manifest.decode(text)
                    _check_files(archive, entries, manifest)
        except FileNotFoundError as error:
            raise BundleError(f"{where}there is no such file; expected a bundle") from error
        except _ZIP_ERRORS as error:
            raise BundleError(f"{where}the bundle is damaged or cut off: {error}") from error
        except EdgeLLError as error:
            raise type(error)(f"{where}{error}") from error
        return cls(source, manifest, digest, size_bytes, key_id)

    def read(self, name: str) -> bytes:
        """The bytes of one file, checked against its hash again.

        Raises:
            BundleError: The bundle does not hold it, or the file changed since it was opened.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            held = ", ".join(sorted(self.manifest.files))
            raise BundleError(f"{self.manifest.name}: holds no {name!r}; it holds {held}")
        try:
            with _reading(self._source) as file, zipfile.ZipFile(file) as archive:
                data = _bounded(archive, _entries(archive), name, entry.size_bytes)
        except _ZIP_ERRORS as error:
            raise BundleError(f"{name}: cannot be read any more: {error}") from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BundleError(f"{name}: changed since the bundle was opened")
        return data

    def array(self, name: str) -> npt.NDArray[Any]:
        """One of the manifest's arrays, read-only, in its dtype and shape."""
        spec = self.manifest.arrays.get(name)
        if spec is None:
            held = ", ".join(sorted(self.manifest.arrays))
            raise BundleError(f"{self.manifest.name}: holds no array {name!r}; it holds {held}")
        data = self.read(spec.file)
        try:
            flat = np.frombuffer(data, np.dtype(spec.dtype).newbyteorder("<"))
            return flat.reshape(spec.shape)
        except ValueError as error:
            raise BundleError(
                f"{name}: {len(data)} bytes do not make {spec.dtype} {spec.shape}"
            ) from error

    def theta(self) -> npt.NDArray[np.float32]:
        """The tail's parameters as exported: float32 [P]."""
        data = self.read(THETA)
        theta = np.frombuffer(data[: len(data) // 4 * 4], "<f4").astype(np.float32)
        if len(data) % 4 or len(theta) != self.manifest.theta_size or not np.isfinite(theta).all():
            raise BundleError(
                f"{THETA}: expected {self.manifest.theta_size} finite values, got {len(theta)}"
            )
        return theta

    def novelty(self) -> NoveltyReference:
        """The reference that new latents are compared with."""
        return NoveltyReference(*(self.array(f"novelty_{f}") for f in NoveltyReference._fields))


def write_bundle(
    path: Path, manifest: Manifest, files: Mapping[str, bytes], signer: Signer
) -> Manifest:
    """Write a signed bundle; the manifest as written, with the files' hashes filled in.

    The same input gives the same bytes: entries are sorted and carry no time.

    Raises:
        BundleError: Too many files, or a name that is the bundle's own.
    """
    reserved = {MANIFEST, SEAL} & set(files)
    if reserved or len(files) > MAX_FILES:
        raise BundleError(
            f"a bundle holds at most {MAX_FILES} files, none of them called {MANIFEST} or {SEAL}; "
            f"got {len(files)}{''.join(f', {name}' for name in sorted(reserved))}"
        )
    listed = {
        name: FileEntry(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        for name, data in sorted(files.items())
    }
    manifest = msgspec.structs.replace(manifest, files=listed)
    text = manifest.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".part")
    with zipfile.ZipFile(staged, "w", zipfile.ZIP_STORED) as archive:
        head = [(SEAL, signer.seal(text)), (MANIFEST, text)]
        for name, data in [*head, *sorted(files.items())]:
            archive.writestr(zipfile.ZipInfo(name), data)
    staged.replace(path)
    return manifest


def _reading(source: Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def _digest(file: BinaryIO) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(_READ_BYTES):
        digest.update(chunk)
        size += len(chunk)
    file.seek(0)
    return digest.hexdigest(), size


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > MAX_FILES + 2:
        raise BundleError(f"expected at most {MAX_FILES} files, got {len(infos)}")
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
        raise BundleError("a name appears twice")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise BundleError(f"{info.filename}: is compressed or encrypted; expected it stored")
        if info.file_size > MAX_FILE_BYTES:
            raise BundleError(f"{info.filename}: is larger than {MAX_FILE_BYTES} bytes")
    return entries


def _bounded(
    archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], name: str, limit: int
) -> bytes:
    info = entries.get(name)
    if info is None:
        raise BundleError(f"{name} is missing; this is not a bundle")
    if info.file_size > limit:
        raise BundleError(f"{name}: expected at most {limit} bytes, got {info.file_size}")
    return archive.read(info)


def _check_files(
    archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], manifest: Manifest
) -> None:
    missing = sorted(set(manifest.files) - set(entries))
    if missing:
        raise BundleError(f"missing: {', '.join(missing)}")
    unlisted = sorted(set(entries) - set(manifest.files) - {MANIFEST, SEAL})
    if unlisted:
        raise BundleError(f"not listed in the manifest: {', '.join(unlisted)}")
    for name, listed in manifest.files.items():
        if entries[name].file_size != listed.size_bytes:
            raise BundleError(
                f"{name}: expected {listed.size_bytes} bytes, got {entries[name].file_size}"
            )
        data = archive.read(name)
        if hashlib.sha256(data).hexdigest() != listed.sha256:
            raise BundleError(f"{name}: its sha256 is not the one in the manifest")
        if name.endswith(".onnx"):
            training = name.startswith(ORT_TRAINING)
            check_onnx(name, data, domains=_TRAINING_DOMAINS if training else _PLAIN_DOMAINS)
