"""What an engine needs on disk: its packages and everything that they require."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package."""
    return {name: metadata.version(name) for name in packages}


def disk_bytes(packages: Iterable[str]) -> int:
    """Sizes of all files of the packages and of what they require, compiled Python left out.

    Requirements that are not installed do not apply here, those of extras are not needed.
    """
    return sum(map(_own_bytes, closure(packages)))


def closure(packages: Iterable[str]) -> set[str]:
    """The packages with everything that they require, by their normalised names."""
    found: set[str] = set()
    todo = [_normal(name) for name in packages]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for requirement in requirements:
            head, _, marker = requirement.partition(";")
            match = _NAME.match(head)
            if match and "extra" not in marker:
                todo.append(_normal(match[0]))
    return found


def _own_bytes(package: str) -> int:
    files = metadata.files(package) or []
    paths = [Path(str(file.locate())) for file in files if file.suffix != ".pyc"]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
