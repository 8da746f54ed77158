"""The `preferences` artifact: pairs of replies to one prompt, of which one is better.

preferences-00000.parquet …   id, prompt (messages as JSON), chosen and rejected (what the assistant says), language,
                              source, margin (by how much it is better, where that is known), content (of the problem
                              that was asked, where it was one: its twin in the other language has the same)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import InputError
from stages.corpus.document import fraction

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "prompt", "chosen", "rejected", "language", "source")),
        ("margin", pa.float64()),
        ("content", pa.string()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two replies to one prompt. `prompt` is its messages as JSON text, which also tells prompts apart."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    language: str
    source: str
    margin: float | None = None
    content: str | None = None

    @property
    def asked(self) -> str:
        """What two pairs must not share to be independent: the problem's content, or the prompt where it was none."""
        return self.prompt if self.content is None else self.content

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt's."""
        return json.loads(self.prompt)

    def reply(self, text: str) -> list[dict[str, str]]:
        """The conversation that ends with `text`."""
        return [*self.messages, {"role": "assistant", "content": text}]


def write_preferences(directory: Path, preferences: Iterable[Preference]) -> int:
    """Write the artifact's file; the number of pairs."""
    rows = [dataclasses.asdict(preference) for preference in preferences]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), directory / "preferences-00000.parquet", compression="zstd")
    return len(rows)


def read_preferences(directory: Path | str) -> list[Preference]:
    """All pairs of a preferences artifact. InputError if there is none, or columns are missing."""
    paths = sorted(Path(directory).glob("preferences-*.parquet"))
    if not paths:
        raise InputError(f"{directory} holds no preferences-*.parquet: give a preferences artifact")
    found: list[Preference] = []
    for path in paths:
        table = pq.read_table(path)
        if missing := set(SCHEMA.names) - {"content"} - set(table.column_names):
            raise InputError(f"{path}: the columns {', '.join(sorted(missing))} are missing; ingest the pairs again")
        there = [name for name in SCHEMA.names if name in table.column_names]  # earlier versions had no content
        found += [Preference(**row) for row in table.select(there).to_pylist()]
    return found


def hold_out(preferences: Iterable[Preference], share: float, seed: int) -> tuple[list[Preference], list[Preference]]:
    """(to learn from, held out). What was asked is held out whole, by the problem's content or else by the prompt's
    text: no choice of pairs can leak it, nor can a problem's twin in the other language.

    One pair of each is kept to measure by, so that the pairs are independent and an interval over them is true.
    """
    learnt: list[Preference] = []
    held: dict[str, Preference] = {}
    for preference in preferences:
        if fraction(preference.asked, f"preferences {seed}") < share:
            held.setdefault(preference.asked, preference)
        else:
            learnt.append(preference)
    return learnt, list(held.values())
