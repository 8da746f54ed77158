"""The document and its shards: `documents-00000.parquet …`, the files of every artifact of kind documents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import InputError

SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "text", "language", "domain", "source", "license")])
SHARD_BYTES = 2 << 20  # text in one shard: the unit of parallel work. Grows with the corpus: see `shard_bytes`
MAX_SHARD_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `id` is unique and stable, "<source>/<key>"; language is en, zh, code or other."""

    id: str
    text: str
    language: str
    domain: str
    source: str
    license: str

    @property
    def bytes(self) -> int:
        return len(self.text.encode())


def fraction(id: str, purpose: str) -> float:
    """A number in [0, 1) that is the same for one id and purpose everywhere: splits and samples are drawn with it."""
    return int.from_bytes(hashlib.blake2b(f"{purpose}\0{id}".encode(), digest_size=7).digest(), "big") / 2**56


def shard_bytes(total: int) -> int:
    """Text bytes a shard: small shards keep two cores busy on little text, large ones keep the file count sane."""
    return min(max(SHARD_BYTES, total // 64), MAX_SHARD_BYTES)


def shard_paths(directory: str | Path) -> list[Path]:
    """The shards of a documents artifact in order. InputError if there is none."""
    paths = sorted(Path(directory).glob("documents-*.parquet"))
    if not paths:
        raise InputError(f"{directory} holds no documents-*.parquet: give an artifact of kind documents")
    return paths


def read_shard(path: str | Path) -> list[Document]:
    """All documents of one shard. InputError names a file that is no Parquet or lacks a column."""
    try:
        table = pq.read_table(path, columns=SCHEMA.names)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is not a readable shard of documents ({reason}): ingest again") from None
    if missing := set(SCHEMA.names) - set(table.column_names):
        raise InputError(
            f"{path}: the columns {', '.join(sorted(missing))} are missing; ingest it with the stage ingest"
        )
    return [Document(*row) for row in zip(*(table[name].to_pylist() for name in SCHEMA.names), strict=True)]


def read_documents(directory: str | Path) -> Iterator[Document]:
    for path in shard_paths(directory):
        yield from read_shard(path)


def write_shard(directory: str | Path, number: int, documents: Sequence[Document]) -> None:
    columns = [[getattr(document, name) for document in documents] for name in SCHEMA.names]
    table = pa.table(columns, schema=SCHEMA)
    pq.write_table(table, Path(directory) / f"documents-{number:05d}.parquet", compression="zstd")


def write_documents(directory: str | Path, documents: Iterable[Document], target: int = SHARD_BYTES) -> int:
    """Write shards of about `target` bytes of text each; return how many. An empty corpus gets one empty shard."""
    number, held, size = 0, [], 0
    for document in documents:
        held.append(document)
        size += document.bytes
        if size >= target:
            write_shard(directory, number, held)
            number, held, size = number + 1, [], 0
    if held or number == 0:
        write_shard(directory, number, held)
        number += 1
    return number
