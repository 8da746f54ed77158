"""Files on disk: moving a folder, and one file's entry in a manifest."""

from __future__ import annotations

import errno
import hashlib
import shutil
from pathlib import Path
from typing import Any

from infra.artifact import FileEntry

CHUNK = 1 << 20


def move(source: Path, target: Path) -> None:
    """Rename a folder, or copy it where that crosses file systems."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        for path in sorted(p for p in source.rglob("*") if p.is_file()):  # copytree would hide the errno
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def entry(path: Path, base: Path) -> FileEntry:
    """Name, size and digest of one file under `base`."""
    with path.open("rb") as handle:
        digest = sha256(handle)
    return FileEntry(path=path.relative_to(base).as_posix(), bytes=path.stat().st_size, sha256=digest)


def sha256(handle: Any) -> str:
    """SHA-256 of what is left to read."""
    sha = hashlib.sha256()
    while chunk := handle.read(CHUNK):
        sha.update(chunk)
    return sha.hexdigest()
