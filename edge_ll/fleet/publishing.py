"""Putting a bundle before the fleet: verified, copied into place, registered, desired."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edge_ll.bundle import THETA, Bundle, write_bundle
from edge_ll.errors import BundleError
from edge_ll.fleet.registry import Registry
from edge_ll.fleet.rows import BundleRow
from edge_ll.messages import BundleRef
from edge_ll.trust import Signer, TrustStore

BUNDLES, UPDATES = "bundles", "updates"

_COPY_BYTES = 1 << 20


def publish_bundle(
    registry: Registry, folder: Path, path: Path, *, trust: TrustStore, tenant: str
) -> BundleRef:
    """Make a bundle the desired one; a running server notices and offers it.

    Args:
        registry: Where it is registered.
        folder: The server's data folder.
        path: The bundle's file.
        trust: Who may have signed it.
        tenant: Whose devices shall run it.

    Raises:
        BundleError: The file is damaged, unsafe, or changed while it was copied.
        TrustError: It is not signed by a trusted key.
    """
    ref = store_bundle(registry, folder, path, trust=trust)
    registry.set_desired(tenant, ref.digest)
    return ref


def store_bundle(registry: Registry, folder: Path, path: Path, *, trust: TrustStore) -> BundleRef:
    """Verify a bundle, copy it to ``bundles/{digest}.bundle`` and register it.

    Raises:
        BundleError: The file is damaged, unsafe, or changed while it was copied.
        TrustError: It is not signed by a trusted key.
    """
    bundle = Bundle.open(path, trust)
    manifest = bundle.manifest
    name = f"{bundle.digest}.bundle"
    _copy(path, folder / BUNDLES / name, bundle.digest)
    row = BundleRow(
        digest=bundle.digest,
        name=manifest.name,
        version=manifest.version,
        size_bytes=bundle.size_bytes,
        parent=manifest.provenance.parent,
        created_s=manifest.provenance.created_at_s,
        file=name,
        manifest_json=manifest.encode(),
    )
    registry.add_bundle(row)
    return row.ref


def write_merged(
    path: Path,
    base: Bundle,
    theta: npt.NDArray[np.float32],
    *,
    devices: Sequence[str],
    classes: Sequence[int],
    metrics: Mapping[str, float],
    created_at_s: float,
    signer: Signer,
) -> None:
    """Write the successor of ``base``: the same files with another θ, one version higher."""
    old = base.manifest
    provenance = msgspec.structs.replace(
        old.provenance,
        created_at_s=created_at_s,
        metrics={**old.provenance.metrics, **metrics},
        parent=base.digest,
        merged_from=tuple(sorted(devices)),
    )
    manifest = msgspec.structs.replace(
        old,
        version=old.version + 1,
        known_classes=tuple(sorted({*old.known_classes, *classes})),
        provenance=provenance,
    )
    files = {name: base.read(name) for name in old.files}
    files[THETA] = theta.astype("<f4").tobytes()
    write_bundle(path, manifest, files, signer)


def _copy(source: Path, target: Path, digest: str) -> None:
    """Copy what was verified, and nothing else, so that ``target`` is whole or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, staged = tempfile.mkstemp(dir=target.parent, suffix=".part")
    try:
        seen = hashlib.sha256()
        with os.fdopen(descriptor, "wb") as out, source.open("rb") as file:
            while block := file.read(_COPY_BYTES):
                seen.update(block)
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        if seen.hexdigest() != digest:
            raise BundleError(f"{source}: changed while it was copied; push it again")
        # The server may run as another user than the person who pushes.
        Path(staged).chmod(0o644)
        Path(staged).replace(target)
    except OSError as error:
        raise BundleError(f"{target}: cannot be written: {error}") from error
    finally:
        Path(staged).unlink(missing_ok=True)
