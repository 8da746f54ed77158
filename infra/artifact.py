"""What a stage leaves behind: a read-only folder with a manifest whose id is the recipe that made it.

`recipe_id` is the only place where identity is computed: stage name, stage version, every config field, input ids, and
the versions or digests of what the stage reads from outside the store.
Where and how fast something ran is recorded in `Provenance` and never hashed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from infra.errors import InputError
from infra.metrics import METRICS

Kind = Literal[
    "documents",
    "tokenizer",
    "tokens",
    "checkpoint",
    "conversations",
    "problems",
    "rollouts",
    "preferences",
    "reward_model",
    "report",
    "export",
]
KINDS: tuple[str, ...] = get_args(Kind)
MANIFEST = "manifest.json"
ID_PATTERN = re.compile(r"[a-z][a-z0-9_]*/[0-9a-f]{12}")
Scalar = str | int | float | bool | None


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class FileEntry(_Record):
    """One file of an artifact: its path inside the folder, its size in bytes and its SHA-256."""

    path: str
    bytes: int
    sha256: str


class Provenance(_Record):
    """The circumstances of a run: recorded, never hashed into the id."""

    commit: str | None = None
    dirty: bool | None = None
    source_digest: str = Field("", description="SHA-256 of the stage's source and of all of ours that it imports")
    packages: dict[str, str] = {}
    python: str = ""
    platform: str = ""
    device: str = ""
    workers: int = 1
    seed: int | None = None
    started: datetime | None = None
    wall_seconds: float = 0.0
    cost: float | None = Field(None, description="wall hours × the price an hour of the settings, if one is set")
    labels: dict[str, str] = Field({}, description="pipeline, node, recipe, flow run")


class Manifest(_Record):
    """All that is known about an artifact without opening its files."""

    id: str
    kind: Kind
    stage: str
    stage_version: int
    config: dict[str, Any]
    inputs: dict[str, str] = Field(description="role → artifact id; a role of many is role.name")
    input_digests: dict[str, str] = Field({}, description="role → content digest of that input when it was read")
    external: dict[str, str] = Field({}, description="what was read from outside the store → its version or digest")
    summary: dict[str, Scalar]
    provenance: Provenance
    files: tuple[FileEntry, ...]
    created: datetime
    payload: str = Field("", description="sub-folder of the files, for stores that cannot rename a folder")
    seal: str = Field("", description="digest of all the rest of this manifest, so that an edited one is noticed")

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def content_digest(self) -> str:
        """SHA-256 over the files' names and contents: equal for equal results. Metrics carry clock times: left out."""
        return digest([[file.path, file.sha256] for file in self.files if file.path != METRICS])

    def sealed_json(self) -> str:
        """The text that a store keeps, `seal` filled in."""
        record = json.loads(self.model_dump_json(exclude={"seal"}))
        return json.dumps(record | {"seal": digest(record)}, indent=1, ensure_ascii=False)


@dataclass(frozen=True)
class Artifact:
    """A finished artifact whose files lie under `path` on this machine. Never write there."""

    manifest: Manifest
    path: Path

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def kind(self) -> str:
        return self.manifest.kind

    @property
    def config(self) -> dict[str, Any]:
        return self.manifest.config

    @property
    def summary(self) -> dict[str, Scalar]:
        return self.manifest.summary

    @classmethod
    def local(cls, path: Path | str, kind: Kind, summary: Mapping[str, Scalar] | None = None) -> Artifact:
        """A folder that no store knows, so that a stage can be called by itself on files of the user's own."""
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path} is not a folder: a {kind} artifact is a folder of files")
        manifest = Manifest(
            id="local/" + digest(str(path.resolve()))[:12],
            kind=kind,
            stage="local",
            stage_version=0,
            config={},
            inputs={},
            summary=dict(summary or {}),
            provenance=Provenance(),
            files=(),
            created=datetime.now().astimezone(),
        )
        return cls(manifest, path)


def digest(value: Any) -> str:
    """SHA-256, in hex, of a value's canonical JSON (sorted keys, no spaces, no NaN)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def recipe_id(
    stage: str,
    version: int,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    external: Mapping[str, str] | None = None,
) -> str:
    """The artifact id `<stage>/<12 hex>` of a stage run with this config on these inputs."""
    recipe: list[Any] = [stage, version, dict(config), dict(inputs)]
    return f"{stage}/{digest([*recipe, dict(external)] if external else recipe)[:12]}"
