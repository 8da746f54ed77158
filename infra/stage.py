"""A stage: a frozen config and a plain function of `(config, inputs, ctx)`, artifacts in, one artifact out.

The decorated function stays callable by itself on folders of the user's own. `run` is the other way in: it computes
the artifact's id, reuses what the store has, and otherwise runs the function on a draft and commits it.
"""

from __future__ import annotations

import errno
import inspect
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

from infra import provenance
from infra.artifact import KINDS, MANIFEST, Artifact, Kind, Manifest, Provenance, Scalar, recipe_id
from infra.config import Config, nearest
from infra.errors import ConfigError, InputError, StoreError
from infra.lineage import Lineage, lineage
from infra.metrics import METRICS, MetricsLog, Progress
from infra.settings import Settings
from infra.store import ArtifactStore

Inputs = Mapping[str, Any]  # role → Artifact, or a tuple of them for a role of many
Refs = Mapping[str, str]  # role, or role.name for a role of many → artifact id


@dataclass(frozen=True)
class Role:
    """What a stage takes under a name: artifacts of one of `kinds`, exactly one, at most one, or any number."""

    kinds: tuple[str, ...]
    optional: bool = False
    many: bool = False

    @property
    def kind(self) -> str:
        """As it is told to users."""
        return " or ".join(self.kinds)


def one_of(*kinds: Kind) -> Role:
    """A role of one artifact that may be of several kinds."""
    return Role(kinds)


def optional(*kinds: Kind) -> Role:
    """A role that may be left out."""
    return Role(kinds, optional=True)


def many(*kinds: Kind) -> Role:
    """A role of one or more artifacts, given as `role.name`."""
    return Role(kinds, many=True)


@dataclass
class Context:
    """What a run has besides its config and inputs. Nothing here changes what is computed.

    `out` is the draft: every file of the artifact goes there. `scratch` survives a kill and is the same for the same
    artifact. `report(done, total, unit, **metrics)` records a row of metrics and moves the progress line.
    """

    out: Path
    scratch: Path
    workers: int = 1
    on_progress: Callable[[Progress], None] | None = None
    store: ArtifactStore | None = None
    _log: MetricsLog = field(init=False)

    def __post_init__(self) -> None:
        self._log = MetricsLog(self.scratch / METRICS, self.on_progress)

    @classmethod
    def local(cls, folder: Path, workers: int = 1) -> Context:
        """A context under a folder of the caller's, to call a stage by itself."""
        out, scratch = folder / "out", folder / "scratch"
        for path in (out, scratch):
            path.mkdir(parents=True, exist_ok=True)
        return cls(out, scratch, workers)

    def lineage(self, artifact: Artifact) -> Lineage:
        """What an input was made from, back to the raw sources; of a folder that no store knows, itself alone."""
        if self.store is None:
            return Lineage({artifact.id: artifact.manifest}, ())
        return lineage(self.store, artifact.id)

    def report(self, done: int, total: int, unit: str, **metrics: float) -> None:
        self._log.report(done, total, unit, **metrics)


@dataclass(frozen=True)
class Stage:
    """A stage function with what it takes and makes."""

    fn: Callable[[Any, Inputs, Context], dict[str, Scalar]]
    name: str
    version: int
    takes: dict[str, Role]
    makes: Kind
    config_type: type[Config]
    reads: Callable[[Any], dict[str, str]] | None = None

    def __call__(self, config: Config, inputs: Inputs, ctx: Context) -> dict[str, Scalar]:
        return self.fn(config, inputs, ctx)

    def __reduce__(self) -> tuple[Any, ...]:
        return _find_stage, (self.fn.__module__, self.name)

    @property
    def doc(self) -> str:
        """First line of the function's docstring."""
        return (inspect.getdoc(self.fn) or "").partition("\n")[0]

    @property
    def source_digest(self) -> str:
        """Digest of the code that makes this stage's results."""
        return provenance.source_digest(self.fn.__module__)

    def id(self, config: Config, refs: Refs, external: Mapping[str, str] | None = None) -> str:
        """The artifact id that this config on these inputs makes, with what it reads as it is now, or as given."""
        external = self.external(config) if external is None else external
        return recipe_id(self.name, self.version, config.model_dump(mode="json"), refs, external)

    def external(self, config: Config) -> dict[str, str]:
        """Versions or digests of what this config makes the stage read from outside the store."""
        return self.reads(config) if self.reads else {}

    def check_roles(self, refs: Mapping[str, Any]) -> None:
        """Raise ConfigError if a role is unknown or missing."""
        for name in refs:
            role = self.takes.get(name.partition(".")[0])
            if role is None:
                raise ConfigError(f"{self.name} takes no input {name!r}; {nearest(name, self.takes)}")
            if ("." in name) != role.many:
                form = f"give it as {name.partition('.')[0]}.NAME" if role.many else "it takes one artifact"
                raise ConfigError(f"{self.name}: input {name!r}: {form}")
        given = {name.partition(".")[0] for name in refs}
        missing = [name for name, role in self.takes.items() if name not in given and not role.optional]
        if missing:
            raise ConfigError(f"{self.name} needs input {', '.join(f'{m} ({self.takes[m].kind})' for m in missing)}")


def stage(
    *,
    version: int,
    makes: Kind,
    takes: Mapping[str, str | Role] | None = None,
    reads: Callable[[Any], dict[str, str]] | None = None,
) -> Callable[[Callable[..., dict[str, Scalar]]], Stage]:
    """Declare a stage. Raise its `version` when the same config on the same inputs gives a different result.

    A stage that reads what no store holds (a user's files, an installed package) says in `reads` what that is now, as
    name → version or digest: it enters the id, so a changed file is never mistaken for the one that was read.
    """
    roles = {name: role if isinstance(role, Role) else Role((role,)) for name, role in (takes or {}).items()}
    assert makes in KINDS and all(kind in KINDS for role in roles.values() for kind in role.kinds), (makes, roles)

    def declare(fn: Callable[..., dict[str, Scalar]]) -> Stage:
        config_type = get_type_hints(fn)["config"]
        assert issubclass(config_type, Config), config_type
        return Stage(fn, fn.__name__, version, roles, makes, config_type, reads)

    return declare


@dataclass(frozen=True)
class Result:
    """The artifact of a run, whether it was there before, and whether the code has changed since."""

    artifact: Artifact
    reused: bool
    drifted: bool = False


def run(
    stage: Stage,
    config: Config,
    refs: Refs,
    store: ArtifactStore,
    settings: Settings,
    *,
    force: bool = False,
    labels: Mapping[str, str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Return the artifact of `stage(config, refs)`: the store's, or a fresh one (always fresh with `force`).

    Inputs are ids or tags. A kill at any moment leaves no artifact; the next run finds `scratch` as it was.
    """
    stage.check_roles(refs)
    refs = {role: store.resolve(ref) for role, ref in refs.items()}
    external = stage.external(config)
    artifact_id = stage.id(config, refs, external)
    with store.holding([artifact_id, *refs.values()]):
        if store.exists(artifact_id) and not force:
            return _reused(store, stage, artifact_id)
        inputs = {role: store.check(ref) for role, ref in refs.items()}
        for role, artifact in inputs.items():
            wanted = stage.takes[role.partition(".")[0]]
            if artifact.kind not in wanted.kinds:
                raise ConfigError(
                    f"{stage.name}: input {role} is {artifact.id}, a {artifact.kind}; it takes a {wanted.kind}"
                )
        with store.draft(artifact_id) as (out, scratch):
            if store.exists(artifact_id) and not force:  # made by the process that held the lock before us
                return _reused(store, stage, artifact_id)
            started, clock = datetime.now(UTC), time.monotonic()
            ctx = Context(out, scratch, settings.workers, on_progress, store)
            try:
                summary = stage(config, group(stage, inputs), ctx)
                if (scratch / METRICS).exists():
                    shutil.copy(scratch / METRICS, out / METRICS)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise StoreError(
                        f"disk full while {stage.name} was writing: nothing was committed; free space and run again"
                    ) from None
                raise
            assert not (out / MANIFEST).exists(), f"{stage.name} wrote {MANIFEST}, which is the store's"
            wall = time.monotonic() - clock
            if stage.external(config) != external:
                shutil.rmtree(scratch, ignore_errors=True)  # of files that are no more
                raise InputError(
                    f"{stage.name}: the files that it reads changed while it ran; nothing was committed, run again"
                )
            manifest = Manifest(
                id=artifact_id,
                kind=stage.makes,
                stage=stage.name,
                stage_version=stage.version,
                config=config.model_dump(mode="json"),
                inputs=refs,
                input_digests={role: artifact.manifest.content_digest for role, artifact in inputs.items()},
                external=external,
                summary=summary,
                provenance=_provenance(stage, config, settings, started, wall, labels or {}),
                files=(),
                created=started,
            )
            return Result(store.commit(out, manifest, replace=force), reused=False)


def group(stage: Stage, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """Inputs as the function takes them: the artifacts of a role of many as one tuple, in the order of their names."""
    grouped: dict[str, Any] = {}
    for name, artifact in sorted(inputs.items()):  # the id does not know the order given
        role = name.partition(".")[0]
        grouped[role] = (*grouped.get(role, ()), artifact) if stage.takes[role].many else artifact
    return grouped


def _reused(store: ArtifactStore, stage: Stage, artifact_id: str) -> Result:
    artifact = store.check(artifact_id)
    return Result(artifact, reused=True, drifted=artifact.manifest.provenance.source_digest != stage.source_digest)


def _provenance(
    stage: Stage, config: Config, settings: Settings, started: datetime, wall: float, labels: Mapping[str, str]
) -> Provenance:
    commit, dirty = provenance.git_state()
    cost = None if settings.cost_per_hour is None else round(settings.cost_per_hour * wall / 3600, 6)
    return Provenance(
        commit=commit,
        dirty=dirty,
        source_digest=stage.source_digest,
        packages=provenance.package_versions(),
        python=platform.python_version(),
        platform=platform.platform(),
        device=provenance.device_name(),
        workers=settings.workers,
        seed=getattr(config, "seed", None),
        started=started,
        wall_seconds=round(wall, 3),
        cost=cost,
        labels=dict(labels),
    )


def _find_stage(module: str, name: str) -> Stage:
    import importlib

    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, Stage), (module, name)
    return found
