"""CLINC150: 22,500 short requests in English, 150 of each of 150 intents, in ten domains.

Source: S. Larson et al., An Evaluation Dataset for Intent Classification and Out-of-Scope
Prediction, EMNLP 2019, github.com/clinc/oos-eval (CC BY 3.0). The official parts are put together
and divided by the recipe; the out-of-scope requests are left out.

The requests are read from ``$EDGE_LL_DATA/clinc150.json`` where that is set, else from the user's
cache, which is filled by one download. What is pinned is the content: the sha256 over every
request and intent in a canonical order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_ll.errors import DataError
from edge_ll_export.data import source
from edge_ll_export.data.dataset import Dataset, InputSpec
from edge_ll_export.data.source import Fetch
from edge_ll_export.data.tokens import token_ids

SPEC = InputSpec(kind="text", shape=(32,), dtype="int64")  # one of the requests is longer
ROOT = "https://raw.githubusercontent.com/clinc/oos-eval/master/data/"
CONTENT_SHA256 = "7fd23cb9aa42bd73ad877b9b0f097416d2d7ed738a1e1d7372b2217022bb7a1e"

_FILE = "clinc150.json"
_PARTS = ("train", "val", "test")
_MAX_BYTES = 16 << 20

Pack = Mapping[str, Any]


def load_clinc150(*, folder: Path | None = None, fetch: Fetch | None = None) -> Dataset:
    """The requests as token ids int64 ``[22500, 32]``; labels are places in :func:`intents`.

    Args:
        folder: Where ``clinc150.json`` lies; by default ``$EDGE_LL_DATA``, else the cache.
        fetch: Gives the bytes behind a URL; by default an HTTPS download.

    Raises:
        DataError: The file is missing, cannot be downloaded, or is not the pinned content; or
            the tokenizer is not there.
        MissingExtraError: The package ``tokenizers`` is not installed.
    """
    ready = folder or source.ready_folder()
    path = ready / _FILE if ready else source.cached(_FILE)
    if ready or path.exists():
        pack = source.read_json(path)
        check_content(pack)
    else:
        pack = download_clinc150(path, fetch=fetch)
    names = intents(pack)
    texts = [text for part in _PARTS for text, _ in pack[part]]
    y = np.array([names.index(intent) for part in _PARTS for _, intent in pack[part]], np.int64)
    return Dataset(
        x=token_ids(texts, SPEC.shape[0]),
        y=y,
        group=np.zeros_like(y),
        group_names=("clinc150",),
        spec=SPEC,
    )


def intents(pack: Pack) -> tuple[str, ...]:
    """Names of the classes: domain by domain, 15 in each."""
    return tuple(name for names in pack["domains"].values() for name in names)


def download_clinc150(target: Path, *, fetch: Fetch | None = None) -> Pack:
    """Download requests and domains, check their content, and keep them at ``target``.

    Raises:
        DataError: The download failed, or is not the pinned content.
    """
    files = {}
    for name in ("data_full.json", "domains.json"):
        raw = source.download(ROOT + name, name=_FILE, limit=_MAX_BYTES, fetch=fetch)
        try:
            files[name] = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{ROOT}{name} is not JSON: {error}; try again later") from error
    full = files["data_full.json"]
    if not isinstance(full, dict):
        raise DataError(f"{ROOT}data_full.json: expected a table, got {type(full).__name__}")
    pack = {"domains": files["domains.json"], **full}
    check_content(pack)
    source.keep(target, lambda file: file.write(json.dumps(pack).encode()))
    return pack


def content_sha256(pack: Pack) -> str:
    """sha256 over the domains in their order and the requests of each part, sorted.

    Each intent adds the line ``domain intent``, each request ``part<TAB>intent<TAB>request``.
    """
    digest = hashlib.sha256()
    for domain, names in pack["domains"].items():
        for name in names:
            digest.update(f"{domain} {name}\n".encode())
    for part in _PARTS:
        for text, intent in sorted(pack[part]):
            digest.update(f"{part}\t{intent}\t{text}\n".encode())
    return digest.hexdigest()


def check_content(pack: Pack) -> None:
    """Refuse anything but the pinned content.

    Raises:
        DataError: The content is malformed or its sha256 is another.
    """
    try:
        actual = content_sha256(pack)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"CLINC150's parts do not fit together: {error!r}") from error
    source.check_digest("CLINC150", actual, CONTENT_SHA256)
