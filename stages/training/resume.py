"""The state of a running training job, so that a killed one continues to the same last bit.

    step-00000100.pt      model, optimiser and whatever else the trainer puts in its state
    step-00000100.json    size and SHA-256 of that file; its appearance, by rename, is the commit

A state is written beside the old one, synced, read back against its checksum and only then published; the one before
it is kept. A broken newest state therefore costs the steps since the previous one, never the run. There is no
random-number state to save: the trainer seeds each step from (seed, step, rank).
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from infra.errors import StoreError

KEPT = 2


class ResumeStore:
    """States of one job in one folder. Only rank 0 writes; every rank may read."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Publish `state` as of after `step` steps, then drop all but the newest two."""
        path, seal = self._paths(step)
        draft = path.with_suffix(".draft")
        with draft.open("wb") as file:
            hashing = _HashingWriter(file)
            torch.save(state, hashing)
            file.flush()
            os.fsync(file.fileno())
        if _sha256(draft) != hashing.hexdigest():
            raise StoreError(f"{draft} reads back other bytes than were written: that disk is failing")
        draft.replace(path)
        draft.write_text(json.dumps({"bytes": path.stat().st_size, "sha256": hashing.hexdigest()}), encoding="utf-8")
        draft.replace(seal)
        for old in self._steps()[:-KEPT]:
            for stale in reversed(self._paths(old)):  # the seal first: a state without one does not count
                stale.unlink()

    def load(self) -> dict[str, Any] | None:
        """The newest state that is intact, on the CPU; None where nothing was ever saved.

        Raises StoreError if states exist and every one is damaged.
        """
        steps = self._steps()
        for step in reversed(steps):
            path, seal = self._paths(step)
            if _intact(path, seal):
                return torch.load(path, map_location="cpu", weights_only=True)
            logging.getLogger(__name__).warning("%s does not match its checksum; trying the state before it", path)
        if steps:
            raise StoreError(
                f"every saved state in {self.directory} is damaged (steps {steps}): delete it to train from the start"
            )
        return None

    def _paths(self, step: int) -> tuple[Path, Path]:
        return self.directory / f"step-{step:08d}.pt", self.directory / f"step-{step:08d}.json"

    def _steps(self) -> list[int]:
        return sorted(int(seal.stem.removeprefix("step-")) for seal in self.directory.glob("step-*.json"))


class _HashingWriter:
    """A binary file that remembers the SHA-256 of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.flush, self.hexdigest = file.flush, self._hash.hexdigest

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _intact(path: Path, seal: Path) -> bool:
    try:
        record = json.loads(seal.read_text(encoding="utf-8"))
        return path.stat().st_size == record["bytes"] and _sha256(path) == record["sha256"]
    except (OSError, ValueError, KeyError):
        return False
