"""The beginning of a file, as something to show: text, rows, tensors or a picture's address.

Only the bytes that are shown are read, so that a page on a store across a network stays quick.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal

import pyarrow.parquet as pq

from infra.artifact import Manifest
from infra.errors import FathomError
from infra.store import ArtifactStore

TEXT_BYTES = 20_000
ROWS = 20
CELL = 300  # characters
IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
TEXTS = {".txt", ".md", ".toml", ".yaml", ".yml", ".csv", ".jinja", ".py", ".log"}


@dataclass(frozen=True)
class Preview:
    """What to show of a file. `rows` are flat, their cells text; `note` says what was left out."""

    form: Literal["text", "json", "table", "image", "none"]
    text: str = ""
    rows: tuple[dict[str, str], ...] = ()
    note: str = ""


def preview(store: ArtifactStore, manifest: Manifest, path: str) -> Preview:
    """The beginning of one file of an artifact; form "none" with the reason if it cannot be shown."""
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in IMAGES:
        return Preview("image")
    try:
        with store.open(manifest, path) as handle:
            return _READERS.get(suffix, _unknown)(handle)
    except (FathomError, OSError, ValueError, KeyError, struct.error) as error:
        return Preview("none", note=f"cannot be read: {error}")


def _text(handle: BinaryIO) -> Preview:
    data = handle.read(TEXT_BYTES + 1)
    note = f"first {TEXT_BYTES // 1000} kB" if len(data) > TEXT_BYTES else ""
    return Preview("text", data[:TEXT_BYTES].decode(errors="replace"), note=note)


def _json(handle: BinaryIO) -> Preview:
    data = handle.read(TEXT_BYTES + 1)
    if len(data) > TEXT_BYTES:  # too long to be parsed: its beginning as it is
        return Preview("text", data[:TEXT_BYTES].decode(errors="replace"), note=f"first {TEXT_BYTES // 1000} kB")
    return Preview("json", json.dumps(json.loads(data), indent=2, ensure_ascii=False))


def _jsonl(handle: BinaryIO) -> Preview:
    rows: list[dict[str, str]] = []
    while len(rows) < ROWS and (line := handle.readline()):
        value = json.loads(line)
        rows.append({k: cell(v) for k, v in (value if isinstance(value, dict) else {"value": value}).items()})
    return Preview("table", rows=tuple(rows), note=f"first {len(rows)} rows")


def _parquet(handle: BinaryIO) -> Preview:
    file = pq.ParquetFile(handle)
    batch = next(file.iter_batches(batch_size=ROWS), None)
    rows = tuple({k: cell(v) for k, v in row.items()} for row in batch.to_pylist()) if batch else ()
    total = file.metadata.num_rows
    return Preview("table", rows=rows, note=f"first {len(rows)} of {total} rows")


def _safetensors(handle: BinaryIO) -> Preview:
    """Names, types and shapes, from the header: 8 bytes of length, then JSON."""
    (length,) = struct.unpack("<Q", handle.read(8))
    header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    rows = tuple(
        {"tensor": name, "dtype": entry["dtype"], "shape": " × ".join(map(str, entry["shape"]))}
        for name, entry in header.items()
    )
    return Preview("table", rows=rows, note=f"{len(rows)} tensors")


def _unknown(handle: BinaryIO) -> Preview:
    return Preview("none", note="a binary file")


def cell(value: Any) -> str:
    """A table's cell: scalars as they are, the rest as JSON, cut to a readable length."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= CELL else text[: CELL - 1] + "…"


_READERS = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".safetensors": _safetensors,
    **dict.fromkeys(TEXTS, _text),
}
