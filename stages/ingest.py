"""Ingest: read one source into documents, one artifact a source.

A limit takes an even sample of the whole source, not its head: units (files, blocks) come in the order of a hash, each
may fill at most a sixteenth of the budget at first, and reading stops when the budget is full. So the same config
gives the same documents, and a small ingest of a large source reads little more than it keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Annotated, Literal

from pydantic import Field, model_validator

from infra.config import Config
from infra.errors import InputError
from infra.stage import Context, Inputs, stage
from stages.corpus import languages
from stages.corpus.document import Document, fraction, shard_bytes, write_documents
from stages.corpus.normalize import clean
from stages.corpus.parallel import RAY_BYTES, over_shards
from stages.corpus.sources import Raw, Source
from stages.corpus.sources.api_reference import ApiReference
from stages.corpus.sources.files import HubDataset, JsonLines, Parquet, TextFiles
from stages.corpus.sources.python import InstalledDocstrings, PythonCode, PythonDocs
from stages.corpus.sources.worked_problems import WorkedProblems
from stages.problems.registry import WITHOUT_SANDBOX, FamilyName

UNIT_SHARE = 16
TASK_UNITS = 8  # units a worker reads at a time

PACKAGES = ("torch", "transformers", "ray", "prefect", "numpy", "pandas", "pyarrow", "pydantic", "fsspec", "matplotlib")


class BuiltinSource(Config):
    """Text that pip installs: no download at run time."""

    kind: Literal["builtin"] = "builtin"
    name: Literal["api_reference_zh", "api_reference_en", "python_docs", "python_code", "installed_docstrings"]
    packages: tuple[str, ...] = Field(PACKAGES, description="whose docstrings installed_docstrings reads")
    root: str | None = Field(None, description="folder an SDK was installed to with pip --target, for api_reference_*")

    def build(self, config: IngestConfig) -> Source:
        match self.name:
            case "api_reference_zh" | "api_reference_en":
                return ApiReference(self.name[-2:], self.root)
            case "python_docs":
                return PythonDocs()
            case "python_code":
                return PythonCode()
            case "installed_docstrings":
                return InstalledDocstrings(self.packages)


class ProblemSource(Config):
    """Worked problems of the train split, as text."""

    kind: Literal["worked_problems"] = "worked_problems"
    families: tuple[FamilyName, ...] = WITHOUT_SANDBOX
    languages: tuple[Literal["en", "zh"], ...] = ("en", "zh")
    levels: tuple[int, ...] = Field((), description="empty: all that each family has")
    n: int = Field(10_000, ge=1, description="distinct problems")

    def build(self, config: IngestConfig) -> Source:
        return WorkedProblems(self.families, self.languages, self.levels, self.n, config.seed)


class FileSource(Config):
    """Files of the user's own."""

    kind: Literal["files"] = "files"
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="begins the ids of the documents")
    path: str = Field(description="a file, a folder or a glob")
    format: Literal["text", "jsonl", "parquet"]
    text_field: str = "text"
    id_field: str | None = Field(None, description="column with unique ids; the place in the file when unset")
    domain: str = Field("prose", min_length=1)
    license: str = Field(min_length=1, description="SPDX expression, or what the owner calls it")

    def build(self, config: IngestConfig) -> Source:
        source = {"text": TextFiles, "jsonl": JsonLines, "parquet": Parquet}[self.format]
        language = None if config.language == "auto" else config.language
        about = (self.name, self.path, language, self.domain, self.license)
        return source(*about, text_field=self.text_field, id_field=self.id_field)


class DatasetSource(Config):
    """A dataset that the `datasets` library loads by name, or from a folder."""

    kind: Literal["dataset"] = "dataset"
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="begins the ids of the documents")
    path: str = Field(description="what datasets.load_dataset takes")
    subset: str | None = None
    split: str = "train"
    text_field: str = "text"
    domain: str = Field("prose", min_length=1)
    license: str = Field(min_length=1)

    def build(self, config: IngestConfig) -> Source:
        language = None if config.language == "auto" else config.language
        place = (self.name, self.path, self.subset, self.split, self.text_field)
        return HubDataset(*place, language, self.domain, self.license)


class IngestConfig(Config):
    source: Annotated[
        BuiltinSource | ProblemSource | FileSource | DatasetSource, Field(discriminator="kind", title="Source")
    ]
    language: Literal["auto", "en", "zh", "code"] = Field(
        "auto", description="auto: built-in sources say it themselves, other texts are identified one by one"
    )
    max_bytes: int | None = Field(None, ge=1, description="UTF-8 bytes of text to keep, sampled evenly; all when unset")
    max_documents: int | None = Field(None, ge=1)
    min_characters: int = Field(20, ge=1, description="shorter texts are no documents")
    seed: int = 0

    @model_validator(mode="after")
    def _language_belongs_to_files(self) -> IngestConfig:
        if self.language != "auto" and self.source.kind in ("builtin", "worked_problems"):
            raise ValueError("language: a built-in source knows its language; leave language at auto")
        return self


def _outside(config: IngestConfig) -> dict[str, str]:
    return config.source.build(config).versions()


@stage(version=2, makes="documents", reads=_outside)
def ingest(config: IngestConfig, inputs: Inputs, ctx: Context) -> dict:
    """Read one source into documents."""
    source = config.source.build(config)
    units = sorted(source.units(), key=lambda unit: fraction(unit, f"unit {config.seed}"))
    where = getattr(config.source, "path", source.name)
    if not units:
        raise InputError(f"{where} has nothing to read: the source is empty")
    counts: Counter[str] = Counter()
    kept = list(_sample(_documents(source, units, config, counts, ctx), len(units), config))
    if not kept:
        raise InputError(
            f"{where} gave no document of {config.min_characters} characters or more from {len(units)} units: "
            "check the source, or lower min_characters"
        )
    total = sum(document.bytes for document in kept)
    write_documents(ctx.out, kept, shard_bytes(total))
    by_language = Counter(document.language for document in kept)
    return {
        "source": source.name,
        "license": source.license,
        "documents": len(kept),
        "bytes": total,
        "characters": sum(len(document.text) for document in kept),
        **{f"documents_{language}": count for language, count in sorted(by_language.items())},
        "too_short": counts["too_short"],
        "repeated_keys": counts["repeated_keys"],
        "units": len(units),
        "units_read": counts["units"],
    }


def _documents(
    source: Source, units: list[str], config: IngestConfig, counts: Counter[str], ctx: Context
) -> Iterator[list[Document]]:
    """The documents of each unit, lazily: whoever stops asking stops the reading."""
    identify = languages.best_identifier() if source.language is None else languages.identify
    seen: set[str] = set()
    for raw_units in _read_all(source, units, config, ctx):
        for raws in raw_units:
            counts["units"] += 1
            documents = []
            for raw in raws:
                text, id = clean(raw.text), f"{source.name}/{raw.key}"
                if len(text) < config.min_characters:
                    counts["too_short"] += 1
                elif id in seen:
                    counts["repeated_keys"] += 1
                else:
                    seen.add(id)
                    language = raw.language or source.language or identify(text)
                    license = raw.license or source.license
                    documents.append(Document(id, text, language, source.domain, source.name, license))
            yield documents


def _read_all(source: Source, units: list[str], config: IngestConfig, ctx: Context) -> Iterable[list[list[Raw]]]:
    size = 0 if config.max_documents is not None else config.max_bytes or RAY_BYTES
    tasks = [units[i : i + TASK_UNITS] for i in range(0, len(units), TASK_UNITS)]
    read = partial(_read_units, source)
    return over_shards(read, tasks, ctx, size, unit="parts")


def _read_units(source: Source, units: list[str]) -> list[list[Raw]]:
    return [source.read(unit) for unit in units]


def _sample(batches: Iterable[list[Document]], n_units: int, config: IngestConfig) -> Iterator[Document]:
    """Documents within the limits. What exceeds its unit's share waits until every other unit has had a turn."""
    if config.max_bytes is None and config.max_documents is None:
        for batch in batches:
            yield from batch
        return
    size = config.max_bytes if config.max_bytes is not None else 2**63
    count = config.max_documents if config.max_documents is not None else 2**63
    shares = min(UNIT_SHARE, n_units)
    share_size, share_count = -(-size // shares), -(-count // shares)
    backlog: list[Document] = []
    for batch in batches:
        unit_size, unit_count = share_size, share_count
        for document in sorted(batch, key=lambda document: fraction(document.id, f"document {config.seed}")):
            if unit_count <= 0 or document.bytes > unit_size:
                backlog.append(document)
                continue
            if document.bytes > size or count <= 0:
                return
            unit_size, unit_count = unit_size - document.bytes, unit_count - 1
            size, count = size - document.bytes, count - 1
            yield document
    for document in backlog:
        if document.bytes <= size and count > 0:
            size, count = size - document.bytes, count - 1
            yield document
