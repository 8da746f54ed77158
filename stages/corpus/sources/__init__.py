"""Where documents come from.

A source is a small frozen value: `units()` lists the parts that can be read alone (files, blocks of a file), cheaply
and in a fixed order; `read(unit)` gives the texts of one. Ingest draws units by hash, so a limited ingest is an even
sample of the whole source and reads little more than it keeps. Sources are picklable: workers read units side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Raw:
    """A text as its source gives it. `key` is unique in the source; None leaves language and license to the source."""

    key: str
    text: str
    language: str | None = None
    license: str | None = None


class Source(Protocol):
    name: str  # begins every document id
    language: str | None  # None: identify each text
    domain: str
    license: str

    def versions(self) -> dict[str, str]:
        """What `units` and `read` will find, as name → version or digest: the part of identity no config knows."""
        ...

    def units(self) -> list[str]: ...

    def read(self, unit: str) -> list[Raw]: ...
