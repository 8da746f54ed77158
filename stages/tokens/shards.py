"""Packed token shards: every document's ids in a row, and an index that names the document behind any token.

    train-00000.bin, validation-00000.bin   little-endian uint16 (uint32 from 65,536 ids on), no header
    index.parquet                           one row a document, in the order of the shards

A document is `BOS ids EOS` and lies inside one shard. A *position* counts tokens from the start of the split, over all
its shards. `bytes` is the document's UTF-8 length, so a loss in nats becomes bits per byte, exactly, by language.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.errors import InputError

SPLITS = ("train", "validation")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("language", pa.string()),
        ("domain", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),  # tokens from the start of the shard
        ("length", pa.int64()),  # tokens, BOS and EOS included
        ("bytes", pa.int64()),  # UTF-8 bytes of the text
    ]
)


@dataclass(frozen=True)
class DocumentRef:
    """A document inside a split: `start` is the position of its BOS, `length` counts tokens."""

    id: str
    language: str
    domain: str
    source: str
    start: int
    length: int
    bytes: int


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size < 2**16 else "<u4")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Put the tokenizer's files beside what was made with it."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(Path(source) / name, Path(target) / name)


class ShardWriter:
    """Write one shard of each split; `close` gives its index rows. An artifact's shards may be written side by side."""

    def __init__(self, directory: Path, shard: int, vocab_size: int) -> None:
        self._directory, self._shard = Path(directory), shard
        self._dtype = token_dtype(vocab_size)
        self._files: dict[str, BinaryIO] = {}
        self._rows: list[dict] = []

    def add(self, ids: Sequence[int], split: str, **document: str | int) -> None:
        """Append one document; `document` gives id, language, domain, source and bytes."""
        if split not in self._files:
            self._files[split] = (self._directory / f"{split}-{self._shard:05d}.bin").open("wb")
        file = self._files[split]
        offset = file.tell() // self._dtype.itemsize
        self._rows.append({"split": split, "shard": self._shard, "offset": offset, "length": len(ids)} | document)
        file.write(np.asarray(ids, self._dtype).tobytes())

    def close(self) -> pa.Table:
        for file in self._files.values():
            file.close()
        return pa.Table.from_pylist(self._rows, INDEX_SCHEMA)


def write_index(directory: Path, parts: Sequence[pa.Table], vocab_size: int) -> None:
    """Join the shards' rows into index.parquet, the place where a tokens artifact begins."""
    rows = pa.concat_tables(parts).sort_by([(name, "ascending") for name in ("split", "shard", "offset")])
    rows = rows.replace_schema_metadata({"dtype": token_dtype(vocab_size).str})
    pq.write_table(rows, Path(directory) / "index.parquet", compression="zstd")


class TokenShards:
    """One split of a tokens artifact, memory-mapped: nothing is read before it is asked for."""

    def __init__(self, directory: str | Path, split: str) -> None:
        directory = Path(directory)
        if not (directory / "index.parquet").is_file():
            raise InputError(f"{directory} holds no index.parquet: give an artifact of the stage tokenize")
        table = pq.read_table(directory / "index.parquet")
        dtype = np.dtype(table.schema.metadata[b"dtype"].decode())
        self._table = table.filter(pc.equal(table["split"], split)).combine_chunks()
        if self._table.num_rows == 0:
            raise InputError(f"{directory} has no documents in the split {split!r}")
        shards = np.unique(self._table["shard"].to_numpy())
        self._lengths = self._table["length"].to_numpy()
        self._ends = np.cumsum(self._lengths)
        self._starts = self._ends - self._lengths
        paths = [directory / f"{split}-{shard:05d}.bin" for shard in shards]
        self._shards = [np.memmap(path, dtype, "r") for path in paths]
        self._shard_starts = np.cumsum([0] + [len(shard) for shard in self._shards])
        assert self._shard_starts[-1] == self._ends[-1], f"{directory}: shards and index disagree"

    @property
    def n_tokens(self) -> int:
        return int(self._ends[-1])

    @property
    def n_documents(self) -> int:
        return len(self._ends)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every document, in order."""
        return self._lengths

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens [start, start + n) as an array of the shards' dtype. They may cross documents and shards."""
        if not 0 <= start <= start + n <= self.n_tokens:
            raise IndexError(f"[{start}, {start + n}) is outside the split's {self.n_tokens} tokens")
        first = int(np.searchsorted(self._shard_starts, start, "right")) - 1
        pieces = []
        for shard, base in zip(self._shards[first:], self._shard_starts[first:-1], strict=True):
            if base >= start + n:
                break
            pieces.append(shard[max(start - base, 0) : start + n - base])
        return np.concatenate(pieces) if len(pieces) != 1 else np.asarray(pieces[0])

    def documents_of(self, start: int, n: int) -> np.ndarray:
        """The split's document numbers behind tokens [start, start + n), int64 [n]."""
        return np.searchsorted(self._ends, np.arange(start, start + n), "right")

    def document(self, number: int) -> DocumentRef:
        row = self._table.slice(number, 1).to_pylist()[0]
        names = {name: row[name] for name in ("id", "language", "domain", "source", "length", "bytes")}
        return DocumentRef(start=int(self._starts[number]), **names)

    def document_at(self, position: int) -> DocumentRef:
        """The document that the token at `position` belongs to; its BOS and EOS included."""
        if not 0 <= position < self.n_tokens:
            raise IndexError(f"position {position} is outside the split's {self.n_tokens} tokens")
        return self.document(int(np.searchsorted(self._ends, position, "right")))

    def documents(self) -> Iterator[tuple[DocumentRef, np.ndarray]]:
        """Every document with its tokens, in order."""
        for number in range(self.n_documents):
            reference = self.document(number)
            yield reference, self.read(reference.start, reference.length)
