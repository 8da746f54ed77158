"""Small real stages, importable by tests, by their subprocesses and by Ray workers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.artifact import Artifact, Manifest, Provenance, recipe_id
from infra.config import Config, Field
from infra.ray import ray_map
from infra.settings import Settings
from infra.stage import Context, Inputs, many, optional, run, stage
from infra.store import ArtifactStore


class WordsConfig(Config):
    n: int = Field(3, ge=1)
    word: str = "word"
    seed: int = 0


@stage(version=1, makes="documents")
def words(config: WordsConfig, inputs: Inputs, ctx: Context) -> dict[str, Any]:
    """Write `n` lines of one word."""
    (ctx.out / "part").mkdir()
    for i in range(config.n):
        with (ctx.out / "part" / "words.txt").open("a") as handle:
            handle.write(f"{config.word} {i}\n")
        ctx.report(i + 1, config.n, "words", length=len(config.word))
    return {"n": config.n}


class JoinConfig(Config):
    separator: str = " "


@stage(version=1, takes={"left": "documents", "right": optional("documents")}, makes="tokens")
def join(config: JoinConfig, inputs: Inputs, ctx: Context) -> dict[str, Any]:
    """Join the words of one or two inputs into one line."""
    sides = [inputs["left"], *([inputs["right"]] if inputs.get("right") else [])]
    lines = [line for side in sides for line in (side.path / "part" / "words.txt").read_text().splitlines()]
    (ctx.out / "line.txt").write_text(config.separator.join(lines))
    return {"sides": len(sides), "lines": len(lines)}


@stage(version=1, takes={"parts": many("tokens")}, makes="report")
def gather(config: JoinConfig, inputs: Inputs, ctx: Context) -> dict[str, Any]:
    """Copy the lines of many inputs, in the order given."""
    (ctx.out / "all.txt").write_text("|".join((part.path / "line.txt").read_text() for part in inputs["parts"]))
    return {"parts": len(inputs["parts"])}


class StepsConfig(Config):
    steps: int = 10
    hang_at: int = Field(-1, description="wait there to be killed, unless resumed")


@stage(version=1, makes="checkpoint")
def steps(config: StepsConfig, inputs: Inputs, ctx: Context) -> dict[str, Any]:
    """Count, keeping the count in scratch, as training keeps its state."""
    saved = ctx.scratch / "step"
    start = int(saved.read_text()) if saved.exists() else 0
    for step in range(start + 1, config.steps + 1):
        (ctx.out / f"{step}.txt").write_text("half done")
        ctx.report(step, config.steps, "steps", loss=1 / step)
        saved.write_text(str(step))
        if step == config.hang_at and start == 0:
            time.sleep(600)
    return {"resumed_at": start}


class EmptyConfig(Config):
    pass


@stage(version=1, makes="documents")
def full_disk(config: EmptyConfig, inputs: Inputs, ctx: Context) -> dict[str, Any]:
    """Write to a device that is always full."""
    (ctx.out / "some.txt").write_text("before the disk was full")
    with Path("/dev/full").open("w") as handle:
        handle.write("x")
    return {}


def write_to_full_device(_: int) -> None:
    with Path("/dev/full").open("w") as handle:
        handle.write("x")


@stage(version=1, makes="documents")
def full_disk_in_worker(config: EmptyConfig, inputs: Inputs, ctx: Context) -> dict[str, Any]:
    """The same, in a Ray task."""
    list(ray_map(write_to_full_device, [1], ctx))
    return {}


class OutsideConfig(Config):
    path: str


@stage(version=1, makes="documents", reads=lambda config: {"file": Path(config.path).read_text()})
def read_outside(config: OutsideConfig, inputs: Inputs, ctx: Context) -> dict[str, Any]:
    """Read a file that its owner goes on writing once."""
    (ctx.scratch / "state").write_text("of the file before")
    (ctx.out / "copy.txt").write_text(Path(config.path).read_text())
    Path(config.path).write_text("before, and more")
    return {}


class BytesConfig(Config):
    n: int


@stage(version=1, makes="documents")
def blob(config: BytesConfig, inputs: Inputs, ctx: Context) -> dict[str, Any]:
    """Write `n` bytes."""
    (ctx.out / "blob").write_bytes(bytes(config.n))
    return {}


def commit(
    store: ArtifactStore,
    draft: Path,
    name: str = "made",
    config: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
    replace: bool = False,
) -> Artifact:
    """Commit files as the result of an imagined stage `name`."""
    config, inputs = dict(config or {}), dict(inputs or {})
    for path, text in (files or {"file.txt": "text"}).items():
        (draft / path).parent.mkdir(parents=True, exist_ok=True)
        (draft / path).write_text(text)
    manifest = Manifest(
        id=recipe_id(name, 1, config, inputs), kind="report", stage=name, stage_version=1, config=config,
        inputs=inputs, summary={}, provenance=Provenance(), files=(), created=datetime.now(UTC),
        input_digests={role: store.manifest(i).content_digest for role, i in inputs.items()},
    )  # fmt: skip
    return store.commit(draft, manifest, replace=replace)


def race(url: str, workspace: str, writer: int, rounds: int, barrier: Any, results: Any) -> None:
    """In a process of its own: commit `rounds` ids at the same moment as another writer, without the stage's lock."""
    store = ArtifactStore(url, Path(workspace))
    for i in range(rounds):
        draft = Path(workspace) / f"draft-{writer}-{i}"
        barrier.wait(30)
        artifact = commit(store, draft, config={"round": i}, files={f"{n}.txt": f"by {writer}" for n in range(5)})
        results.put((i, artifact.manifest.content_digest, sorted(p.read_text() for p in artifact.path.glob("*.txt"))))


def run_steps(store: str, hang_at: int) -> None:
    """In a process of its own: run `steps`."""
    run(steps, StepsConfig(hang_at=hang_at), {}, ArtifactStore(store), Settings(store=store))
