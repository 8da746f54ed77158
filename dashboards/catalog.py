"""What the explorer says about artifacts, as plain values: rows of the listing, facts of one, fields of two.

Pure functions of manifests: no page and no file is touched here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from infra.artifact import FileEntry, Manifest
from infra.errors import FathomError
from infra.metrics import METRICS
from infra.store import ArtifactStore, differences

HEADLINE_FIGURES = 4
THIN = "\u202f"  # a narrow space that does not break the line
SECTIONS = ("summary", "config", "inputs", "provenance")


@dataclass(frozen=True)
class Catalog:
    """All manifests that can be read, newest first, the tags of each, and what is wrong with the rest."""

    manifests: tuple[Manifest, ...]
    tags: dict[str, str]
    broken: dict[str, str]

    @classmethod
    def read(cls, store: ArtifactStore) -> Catalog:
        """One pass over the store. An artifact that cannot be read is listed in `broken`, not hidden and not fatal."""
        manifests, broken = [], {}
        for artifact_id in store.ids():
            try:
                manifests.append(store.manifest(artifact_id))
            except FathomError as error:
                broken[artifact_id] = str(error)
        manifests.sort(key=lambda m: (m.created, m.id), reverse=True)
        return cls(tuple(manifests), store.tags(), broken)

    def tags_of(self, artifact_id: str) -> list[str]:
        return sorted(name for name, target in self.tags.items() if target == artifact_id)

    def children(self, artifact_id: str) -> list[tuple[str, Manifest]]:
        """(role, artifact) of everything made directly from this one, oldest first."""
        return [
            (role, manifest)
            for manifest in reversed(self.manifests)
            for role, parent in manifest.inputs.items()
            if parent == artifact_id
        ]

    def rows(self, now: datetime) -> list[dict[str, Any]]:
        """The listing's rows. Cells are scalars: tags are joined by spaces."""
        return [
            {
                "id": manifest.id,
                "kind": manifest.kind,
                "stage": manifest.stage,
                "created": manifest.created.isoformat(),
                "ago": ago(manifest.created, now),
                "bytes": manifest.bytes,
                "size": size(manifest.bytes),
                "seconds": manifest.provenance.wall_seconds,
                "wall": duration(manifest.provenance.wall_seconds),
                "tags": " ".join(self.tags_of(manifest.id)),
                "headline": headline(manifest.summary),
            }
            for manifest in self.manifests
        ]


def select(
    rows: Iterable[Mapping[str, Any]],
    text: str = "",
    kinds: Sequence[str] = (),
    stages: Sequence[str] = (),
    tagged: bool = False,
) -> list[dict[str, Any]]:
    """Rows that hold every word of `text` somewhere, of those kinds and stages if any are named."""
    words = text.lower().split()
    chosen = []
    for row in rows:
        whole = " ".join(str(row[key]) for key in ("id", "kind", "tags", "headline")).lower()
        if (
            all(word in whole for word in words)
            and (not kinds or row["kind"] in kinds)
            and (not stages or row["stage"] in stages)
            and (not tagged or row["tags"])
        ):
            chosen.append(dict(row))
    return chosen


def headline(summary: Mapping[str, Any]) -> str:
    """The first figures of a summary, which a stage puts in order of importance."""
    shown = [f"{key} {figure(value)}" for key, value in summary.items() if value is not None]
    return " · ".join(shown[:HEADLINE_FIGURES])


def figure(value: Any) -> str:
    """A value as people read it: 4 significant digits, thousands apart, dashes for nothing."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", THIN)
    if isinstance(value, float):
        return f"{value:,.0f}".replace(",", THIN) if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return str(value)


def size(count: int) -> str:
    """Bytes with a binary unit."""
    if count < 1024:
        return f"{count} B"
    amount = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        amount /= 1024
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
    return f"{amount / 1024:.3g} TiB"


def duration(seconds: float) -> str:
    """Seconds as the two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def ago(then: datetime, now: datetime) -> str:
    """How long ago, in the largest unit."""
    seconds = max(0.0, (now - then).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit} ago"
    return "just now"


def flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted path, leaf) of nested mappings; lists stay leaves."""
    leaves: list[tuple[str, Any]] = []
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            leaves += flatten(inner, f"{prefix}{key}.")
        else:
            leaves.append((prefix + key, inner))
    return leaves


def facts(manifest: Manifest) -> list[tuple[str, str]]:
    """Provenance as (name, text), most asked first; what is not known is left out."""
    made = manifest.provenance
    commit = f"{made.commit[:12]}{' + uncommitted changes' if made.dirty else ''}" if made.commit else ""
    told = [
        ("created", manifest.created.strftime("%Y-%m-%d %H:%M:%S UTC")),
        ("took", duration(made.wall_seconds)),
        ("cost", "" if made.cost is None else figure(made.cost)),
        ("stage", f"{manifest.stage}, version {manifest.stage_version}"),
        ("seed", "" if made.seed is None else str(made.seed)),
        ("workers", str(made.workers)),
        ("device", made.device),
        ("commit", commit),
        ("source", made.source_digest[:12]),
        ("content", manifest.content_digest[:12]),
        ("python", made.python),
        ("platform", made.platform),
        *((name, value) for name, value in made.labels.items()),
        ("packages", ", ".join(f"{name} {version}" for name, version in made.packages.items())),
    ]
    return [(name, text) for name, text in told if text]


@dataclass(frozen=True)
class Difference:
    """One field in which two artifacts differ. `change` is right − left, and relative to left, for two numbers."""

    section: str
    field: str
    left: str
    right: str
    change: str


def compare(left: Manifest, right: Manifest) -> list[Difference]:
    """Every field of summary, config, inputs, provenance and files in which two artifacts differ."""
    found = []
    for section in SECTIONS:
        a, b = (m.model_dump(mode="json")[section] for m in (left, right))
        found += [Difference(section, path, figure(x), figure(y), change(x, y)) for path, x, y in differences(a, b)]
    a, b = ({file.path: file for file in m.files if file.path != METRICS} for m in (left, right))
    for path in sorted({*a, *b}):
        if a.get(path) != b.get(path):
            found.append(Difference("files", path, _file(a.get(path)), _file(b.get(path)), ""))
    return found


def change(left: Any, right: Any) -> str:
    """right − left of two numbers, signed, with the per cent of left."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (left, right))
    if not numbers:
        return ""
    step = right - left
    return f"{step:+.4g}" + (f" ({100 * step / abs(left):+.1f} %)" if left else "")


def _file(entry: FileEntry | None) -> str:
    return f"{size(entry.bytes)}, {entry.sha256[:8]}" if entry else "—"
