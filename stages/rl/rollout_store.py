"""Replies on disk as soon as they are there, so that a killed run asks for nothing twice.

    rollouts-00004-0001.parquet   step 4, chunk 1: rows of `rollout.SCHEMA`, with the chunk's key in the metadata

A chunk is a function of its key: the weights, the seed, the questions and how they were put. A file of another key (of
other weights, say, where a run goes on from an earlier state on another number of ranks) is not taken but replaced, and
a damaged one is as good as none. So a reply is in the store once, by step, chunk and place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from stages.rl.rollout import FILES, read_table, write_rollouts


class RolloutStore:
    """Chunks of one job in one folder that all ranks see. Each chunk has one writer; a step is a number from 1."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, step: int, chunk: int, key: str) -> list[dict[str, Any]] | None:
        """Rows of the chunk, if it was written under this key and is whole."""
        path = self._path(step, chunk)
        try:
            if (pq.read_schema(path).metadata or {}).get(b"key") != key.encode():
                return None
            return read_table(path).to_pylist()
        except (FileNotFoundError, pa.ArrowException, OSError):
            return None

    def put(self, step: int, chunk: int, key: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write the chunk so that it survives a kill and a power cut from here on."""
        write_rollouts(self._path(step, chunk), rows, key)

    def cut(self, step: int, chunks: int) -> None:
        """Forget what the step has beyond its first `chunks`: those of a run that was killed and took another turn."""
        for path, number, chunk in self._files():
            if number == step and chunk >= chunks:
                path.unlink()

    def keep(self, wanted: Callable[[int], bool]) -> None:
        """Forget the steps that are not wanted."""
        for path, step, _ in self._files():
            if not wanted(step):
                path.unlink()

    def copy(self, out: Path, wanted: Callable[[int], bool]) -> None:
        """Copy the files of the wanted steps into `out`."""
        for path, step, _ in self._files():
            if wanted(step):
                shutil.copy(path, out / path.name)

    def _path(self, step: int, chunk: int) -> Path:
        return self.folder / f"rollouts-{step:05d}-{chunk:04d}.parquet"

    def _files(self) -> list[tuple[Path, int, int]]:
        paths = sorted(self.folder.glob(FILES))
        return [(path, *map(int, path.stem.split("-")[1:])) for path in paths]  # type: ignore[misc]


def weights_digest(named_tensors: Iterable[tuple[str, Tensor]]) -> str:
    """What tells trained weights from others: names and the XOR of the bits of each tensor, which costs one read of
    them. Numbers that only changed places look the same."""
    names, tensors = zip(*named_tensors, strict=True)
    bits = torch.stack([torch.hash_tensor(tensor) for tensor in tensors]).tolist()
    return sha256(repr(list(zip(names, bits, strict=True))).encode()).hexdigest()
