"""Files of the user's own: plain text, JSON Lines, Parquet; and any dataset that the `datasets` library can load.

Large files are read in blocks (1 MiB of JSON Lines, a Parquet row group, 1,000 rows of a dataset), so that a limited
ingest samples evenly and several workers share one file. A mistake is an InputError that names the file and the fix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from infra.config import Config, Field
from infra.errors import InputError
from stages.corpus.sources import Raw

BLOCK_BYTES = 1 << 20
BLOCK_ROWS = 1000


Convert = Callable[[Any, str, str, Mapping[str, Any]], str]


def plain_text(value: Any, field: str, where: str, beside: Mapping[str, Any]) -> str:
    """What a document's field must hold; other sources have other converters, each a function of its own name."""
    if not isinstance(value, str):
        raise InputError(f"{where}: the field {field!r} is {type(value).__name__}, not text")
    return value


def find_files(path: str, suffixes: tuple[str, ...], field: str) -> list[Path]:
    """The file at `path`, the files of those suffixes under the folder, or what the glob matches; `field` named it."""
    place = Path(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        found = [file for file in sorted(place.rglob("*")) if file.is_file() and file.suffix in suffixes]
    else:
        matches = sorted(glob(path, recursive=True))  # noqa: PTH207 (an absolute pattern)
        found = [Path(file) for file in matches if Path(file).is_file()]
    if not found:
        kinds = " or ".join(suffixes)
        raise InputError(f"{field}: no file at {path!r}; give a {kinds} file, a folder of them or a glob")
    return found


def digest_files(files: Iterable[Path]) -> str:
    """One digest over the files' names and contents, wherever they lie."""
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            whole.update(f"{file.name}\0{hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


@dataclass(frozen=True)
class _Files:
    """`path` is a file, a folder or a glob; `text_field` and `id_field` name columns."""

    name: str
    path: str
    language: str | None
    domain: str
    license: str
    text_field: str = "text"
    id_field: str | None = None
    suffixes: tuple[str, ...] = ()
    convert: Convert = plain_text
    option: str = "source.text_field"  # where a user names the field
    beside: tuple[str, ...] = ()  # further columns; `convert` is given those that a row has, by name

    def files(self) -> list[Path]:
        return find_files(self.path, self.suffixes, "source.path")

    def versions(self) -> dict[str, str]:
        return {"files": digest_files(self.files())}

    def row(self, values: Mapping[str, Any], key: str, where: str) -> Raw:
        self.check(values, where)
        if self.id_field is not None:
            key = str(values[self.id_field])
        beside = {name: values[name] for name in self.beside if name in values}
        return Raw(key, self.convert(values[self.text_field], self.text_field, where, beside))

    def check(self, names: Collection[str], where: str) -> None:
        """InputError if a field that is asked for is not there."""
        if self.text_field not in names:
            have = ", ".join(sorted(names)) or "none"
            raise InputError(f"{where}: no field {self.text_field!r} (it has {have}); set {self.option}")
        if self.id_field is not None and self.id_field not in names:
            raise InputError(f"{where}: no field {self.id_field!r}; set source.id_field, or leave it out")


@dataclass(frozen=True)
class TextFiles(_Files):
    """One document a file."""

    suffixes: tuple[str, ...] = (".txt", ".md", ".rst")

    def units(self) -> list[str]:
        return [str(file) for file in self.files()]

    def read(self, unit: str) -> list[Raw]:
        return [Raw(unit, decode(Path(unit).read_bytes(), unit))]


@dataclass(frozen=True)
class JsonLines(_Files):
    """One document a line."""

    suffixes: tuple[str, ...] = (".jsonl", ".ndjson", ".json")

    def units(self) -> list[str]:
        sizes = ((file, file.stat().st_size) for file in self.files())
        return [f"{file}:{start}" for file, size in sizes for start in range(0, size, BLOCK_BYTES)]

    def read(self, unit: str) -> list[Raw]:
        """The lines that begin inside the block."""
        path, _, start = unit.rpartition(":")
        first, rows = int(start), []
        with Path(path).open("rb") as file:
            if first:
                file.seek(first - 1)
                file.readline()  # the rest of a line that the block before reads
            while (offset := file.tell()) < first + BLOCK_BYTES and (line := file.readline()):
                if line.strip():
                    rows.append(self._parse(line, path, offset))
        return rows

    def _parse(self, line: bytes, path: str, offset: int) -> Raw:
        where = f"{path} at byte {offset}"
        try:
            values = json.loads(decode(line, where))
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not a JSON value ({error.msg}); every line must be one object") from None
        if not isinstance(values, dict):
            raise InputError(f"{where}: a line must be a JSON object, this is {type(values).__name__}")
        return self.row(values, f"{Path(path).name}:{offset}", where)


@dataclass(frozen=True)
class Parquet(_Files):
    """One document a row."""

    suffixes: tuple[str, ...] = (".parquet",)

    def units(self) -> list[str]:
        counts = ((file, _parquet(str(file)).num_row_groups) for file in self.files())
        return [f"{file}:{group}" for file, count in counts for group in range(count)]

    def read(self, unit: str) -> list[Raw]:
        path, _, group = unit.rpartition(":")
        file = _parquet(path)
        self.check(file.schema_arrow.names, path)
        asked = {self.text_field, self.id_field, *self.beside}
        columns = [name for name in file.schema_arrow.names if name in asked]
        try:
            rows = file.read_row_group(int(group), columns=columns).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: row group {group} is corrupt ({_line(error)}); write the file again") from None
        return [self.row(row, f"{Path(path).name}:{group}:{i}", path) for i, row in enumerate(rows)]


@dataclass(frozen=True)
class HubDataset:
    """A dataset by the name that `datasets.load_dataset` knows, or a folder on this machine."""

    name: str
    path: str
    subset: str | None
    split: str
    text_field: str
    language: str | None
    domain: str
    license: str
    convert: Convert = plain_text
    option: str = "source.text_field"
    beside: tuple[str, ...] = ()

    def versions(self) -> dict[str, str]:
        return {}  # a dataset's name is its identity: finding its revision would mean fetching it to plan

    def units(self) -> list[str]:
        data = _load_dataset(self.path, self.subset, self.split)
        if self.text_field not in data.column_names:
            have = ", ".join(data.column_names)
            raise InputError(f"dataset {self.path}: no column {self.text_field!r} (it has {have}); set {self.option}")
        return [str(start) for start in range(0, len(data), BLOCK_ROWS)]

    def read(self, unit: str) -> list[Raw]:
        data = _load_dataset(self.path, self.subset, self.split)
        rows = data[int(unit) : int(unit) + BLOCK_ROWS]
        where, found = f"dataset {self.path}, ", []
        for place, text in enumerate(rows[self.text_field]):
            key = f"{self.split}/{int(unit) + place}"
            beside = {name: rows[name][place] for name in self.beside if name in rows}
            found.append(Raw(key, self.convert(text, self.text_field, where + key, beside)))
        return found


def decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"byte {error.start} (0x{data[error.start]:02x})"
        raise InputError(f"{where}: {place} is not UTF-8; convert it, e.g. iconv -f GB18030 -t UTF-8") from None


def _parquet(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file ({_line(error)}): write it again") from None


@cache
def _load_dataset(path: str, subset: str | None, split: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(path, subset, split=split)
    except (DatasetNotFoundError, FileNotFoundError, ValueError, ConnectionError) as error:
        raise InputError(f"datasets cannot load {path!r} (split {split!r}): {_line(error)}") from None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class OwnFiles(Config):
    """Where files of the user's own lie: what sources of other things than documents have in their configs too."""

    kind: Literal["files"] = "files"
    path: str = Field(description="a file, a folder or a glob")
    format: Literal["jsonl", "parquet"]
    id_field: str | None = Field(None, description="column with unique ids; the place in the file when unset")

    def source(self, name: str, domain: str, license: str, column: str, **reading: Any) -> JsonLines | Parquet:
        """`reading`: convert, option and beside of the source."""
        kind = {"jsonl": JsonLines, "parquet": Parquet}[self.format]
        return kind(name, self.path, None, domain, license, column, self.id_field, **reading)


class OwnDataset(Config):
    """A dataset that the `datasets` library loads by name, or from a folder."""

    kind: Literal["dataset"] = "dataset"
    path: str = Field(description="what datasets.load_dataset takes")
    subset: str | None = None
    split: str = "train"

    def source(self, name: str, domain: str, license: str, column: str, **reading: Any) -> HubDataset:
        """As `OwnFiles.source`."""
        return HubDataset(name, self.path, self.subset, self.split, column, None, domain, license, **reading)
