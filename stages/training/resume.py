"""The state of a running training job, so that a killed one continues to the same last bit.

    step-00000100/         a `torch.distributed.checkpoint` (DCP)
      __0_0.distcp …       tensors, in files of the ranks that wrote them
      .metadata            which tensor lies where
      seal.json            SHA-256 of each file above
    step-00000150.draft/   a save under way, or one that a kill cut short

`save` returns when the state is copied to the CPU; what follows runs in the background. Every rank writes its share (a
tensor that all ranks hold is written by one of them, a sharded one by those that have its shards), syncs it, and reads
it back against the digest of what it wrote. Rank 0 seals the draft and renames it, which is the commit. A kill at any
moment costs the steps since the state before, and so does a state that is found damaged. There is no random-number
state to save: the trainer seeds each step from (seed, step, rank).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from infra.errors import StoreError

SEAL = "seal.json"
STRUCTURE = "structure"  # the state with its tensors left out, pickled: DCP itself keeps only dicts with string keys


@dataclass(frozen=True)
class Retention:
    """Which states stay: the `newest` few and, if `every` is given, those of each step that it divides."""

    newest: int = 2
    every: int | None = None

    def stale(self, steps: list[int]) -> list[int]:
        """Of all `steps`, sorted, those to delete."""
        return [step for step in steps[: -self.newest] if self.every is None or step % self.every]


class ResumeStore:
    """States of one job in one folder that all ranks see. Use it as a context: leaving waits for the save under way."""

    def __init__(self, directory: Path | str, retention: Retention | None = None) -> None:
        self.directory, self.retention = Path(directory), retention or Retention()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._saving: Future[Any] | None = None
        self._group: dist.ProcessGroup | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Publish `state` (dicts, lists, tensors, whatever pickles) as of after `step` steps. Every rank calls it.

        Raises what the save before it failed with: OSError (disk full) or StoreError.
        """
        self.wait()
        alone = not dist.is_initialized()
        if not alone and self._group is None:
            self._group = dist.new_group(
                backend="gloo"
            )  # its own: the background's messages must not mix with training's
        if alone or dist.get_rank() == 0:
            for left in (*self.directory.glob("step-*.draft"), *self.directory.glob("step-*.gone")):
                shutil.rmtree(left)
        tensors: dict[str, Any] = {}
        structure = pickle.dumps(_take_tensors(state, "", tensors))
        assert STRUCTURE not in tensors
        _ignore_single_process_warning()
        self._saving = dcp.async_save(
            {**tensors, STRUCTURE: structure},
            storage_writer=_Writer(self._folder(step).with_suffix(".draft"), self._publish),
            process_group=self._group,
        )

    def wait(self) -> None:
        """Until nothing is being saved. Raises what the save under way failed with."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except CheckpointException as error:  # no Exception, and one for each rank that failed
            raise next(iter(error.failures.values()))[0] from error

    def load(self) -> dict[str, Any] | None:
        """The newest state that is intact, on the CPU; None where nothing was ever saved. Any rank, any world size.

        Raises StoreError if states exist and every one is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            folder = self._folder(step)
            if _intact(folder):
                return _read(folder)
            logging.getLogger(__name__).warning("%s does not match its seal; trying the state before it", folder)
        if steps:
            raise StoreError(
                f"every saved state in {self.directory} is damaged (steps {steps}): delete it to train from the start"
            )
        return None

    def steps(self) -> list[int]:
        """Steps whose states were published, sorted."""
        names = (path.name.removeprefix("step-") for path in self.directory.glob("step-*"))
        return sorted(int(name) for name in names if name.isdigit())

    def _folder(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _publish(self, draft: Path) -> None:
        target = draft.with_suffix("")
        if target.exists():  # a damaged one, done again
            _remove(target)
        draft.rename(target)
        _sync(self.directory)
        for step in self.retention.stale(self.steps()):
            _remove(self._folder(step))


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, which stages through pinned memory, reads back what it wrote, seals it and has it published."""

    def __init__(self, draft: Path, publish: Callable[[Path], None]) -> None:
        super().__init__(draft, per_thread_copy_ahead=0)  # staged tensors are on the CPU already
        self.fs = _Files()
        self._draft, self._publish = draft, publish

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copies on the CPU, so that training may go on; from CUDA into pinned memory, as fast as the bus."""
        staged = {
            name: value.detach().to("cpu", non_blocking=True, copy=True) if isinstance(value, Tensor) else value
            for name, value in state_dict.items()
        }
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the device at large may be recording a graph beside us
        return staged

    def write_data(self, plan: Any, planner: Any) -> torch.futures.Future[Any]:
        """This rank's files. DCP hands the value to rank 0's `finish` as it is, so the digests travel with it."""
        written = super().write_data(plan, planner).value()
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result((written, self._read_back()))
        return done

    def finish(self, metadata: Any, results: list[Any]) -> None:
        """Rank 0, when all ranks have written: the metadata, the seal, the commit."""
        super().finish(metadata, [written for written, _ in results])
        digests = {name: digest for _, part in results for name, digest in part.items()} | self._read_back()
        seal = self._draft / SEAL
        seal.write_text(json.dumps(digests, indent=1), encoding="utf-8")
        _sync(seal)
        _sync(self._draft)
        self._publish(self._draft)

    def _read_back(self) -> dict[str, str]:
        """{name: SHA-256} of what was written since the last call."""
        digests, self.fs.digests = self.fs.digests, {}
        for name, digest in digests.items():
            _sync(self._draft / name)  # DCP's own sync of the metadata comes before its buffer is flushed
            if _sha256(self._draft / name) != digest:
                raise StoreError(f"{self._draft / name} reads back other bytes than were written: that disk is failing")
        return digests


class _Files(FileSystem):
    """Files that remember the SHA-256 of what was written to them."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as file:
            hashing = _Hashing(file)
            try:
                yield hashing
            except RuntimeError as error:  # torch.save's word for a write that failed
                raise hashing.failure or error from None
        self.digests[Path(path).name] = hashing.hexdigest()

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _Hashing:
    """A file opened for writing, and the SHA-256 of what goes into it."""

    def __init__(self, file: Any) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.hexdigest = self._hash.hexdigest
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        self._hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Taken(NamedTuple):
    """Stands in a structure where the tensor of this name was."""

    name: str


def _take_tensors(value: Any, name: str, tensors: dict[str, Any]) -> Any:
    """`value` with its tensors moved into `tensors`, named by their path."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return _Taken(name)
    if isinstance(value, dict):
        return {key: _take_tensors(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_take_tensors(item, f"{name}/{number}", tensors) for number, item in enumerate(value)]
    return value


def _put_tensors(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, _Taken):
        return tensors[value.name]
    if isinstance(value, dict):
        return {key: _put_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_tensors(item, tensors) for item in value]
    return value


def _read(folder: Path) -> dict[str, Any]:
    """All of a state, whole tensors whatever ranks wrote their shards."""
    _ignore_single_process_warning()
    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    found: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in entries.items()
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return _put_tensors(pickle.loads(found.pop(STRUCTURE)), found)


def _ignore_single_process_warning() -> None:
    """DCP warns where there is no process group, which is how one process trains here."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def _intact(folder: Path) -> bool:
    try:
        digests = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return all(_sha256(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def _remove(folder: Path) -> None:
    """Delete a state so that a kill in between leaves none that looks whole or damaged."""
    gone = folder.rename(folder.with_suffix(".gone"))
    shutil.rmtree(gone)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Bytes of a file, or entries of a folder, down to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
