"""What running work tells the collector: these artifacts are in use. It holds for as long as the process lives.

One locked file a holder. Holders share a gate while they register, and the collector has it alone while it deletes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

GATE = "gate"


@contextlib.contextmanager
def holding(folder: Path, ids: Iterable[str]) -> Iterator[None]:
    """Hold the ids; wait first for a collection that is under way and does not know of this."""
    path = folder / f"{uuid.uuid4().hex}.json"
    with contextlib.ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / GATE).open("a+") as gate:
            fcntl.flock(gate, fcntl.LOCK_SH)
            handle = stack.enter_context(path.open("w"))
            stack.callback(path.unlink, missing_ok=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
            handle.write(json.dumps(sorted(ids)))
            handle.flush()
        yield


@contextlib.contextmanager
def collecting(folder: Path) -> Iterator[set[str]]:
    """Yield the ids that living processes hold, and let nobody hold more until the end."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / GATE).open("a+") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        ids: set[str] = set()
        for path in folder.glob("*.json"):
            with contextlib.suppress(FileNotFoundError), path.open("r+") as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    ids.update(json.load(handle))
                else:
                    path.unlink(missing_ok=True)  # its process was killed
        yield ids
