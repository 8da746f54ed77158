"""`fathom artifacts`: what the store has, where it came from, and whether it is still what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

import stages
from flows.console import console, headline, rows_table, size
from flows.environment import open_store
from infra.artifact import KINDS, Manifest
from infra.config import nearest
from infra.errors import ConfigError, TamperedArtifact
from infra.lineage import lineage as trace
from infra.settings import Settings
from infra.store import ArtifactStore, differences

app = typer.Typer(no_args_is_help=True, help="List, show, compare, tag, verify and collect artifacts.")

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Ref = Annotated[str, typer.Argument(metavar="ID_OR_TAG", help="An id, a tag, or a prefix that only one id has.")]


def _store() -> ArtifactStore:
    return open_store(Settings.load())


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _tags_by_id(store: ArtifactStore) -> Callable[[str], list[str]]:
    names: dict[str, list[str]] = {}
    for name, artifact_id in sorted(store.tags().items()):
        names.setdefault(artifact_id, []).append(name)
    return lambda artifact_id: names.get(artifact_id, [])


def _row(manifest: Manifest, tags: list[str]) -> dict[str, Any]:
    return {
        "id": manifest.id,
        "kind": manifest.kind,
        "stage": manifest.stage,
        "created": manifest.created.isoformat(),
        "tags": tags,
        "inputs": manifest.inputs,
        "summary": manifest.summary,
        "bytes": manifest.bytes,
    }


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Option(help="documents, tokens, checkpoint, …")] = None,
    stage: Annotated[str | None, typer.Option(help="Made by this stage.")] = None,
    as_json: Json = False,
) -> None:
    """All artifacts, oldest first.

    Example: fathom artifacts list --kind checkpoint --json
    """
    for option, name, names in (("--kind", kind, KINDS), ("--stage", stage, stages.NAMES)):
        if name is not None and name not in names:
            raise ConfigError(f"{option}: no {option[2:]} {name!r}; {nearest(name, names)}")
    store = _store()
    tags = _tags_by_id(store)
    rows = [_row(manifest, tags(manifest.id)) for manifest in store.find(kind, stage)]
    if as_json:
        _print_json(rows)
        return
    header = ("Artifact", "Kind", "Created", "Tags", "Size", "Result")
    cells = (
        (r["id"], r["kind"], r["created"][:16], "\n".join(r["tags"]), size(r["bytes"]), headline(r["summary"], 3))
        for r in rows
    )
    console().print(rows_table(header, cells, None if rows else f"no artifacts in {store.root}"))


@app.command()
def show(ref: Ref, as_json: Json = False) -> None:
    """One artifact's whole manifest: config, inputs, summary, provenance, files.

    Example: fathom artifacts show pretrain@latest
    """
    store = _store()
    artifact = store.get(ref)
    manifest = artifact.manifest
    if as_json:
        _print_json(manifest.model_dump(mode="json") | {"tags": _tags_by_id(store)(manifest.id)})
        return
    out = console()
    made = manifest.provenance
    facts = {
        "kind": manifest.kind,
        "path": artifact.path,
        "created": manifest.created.isoformat(),
        "tags": ", ".join(_tags_by_id(store)(manifest.id)),
        "inputs": "\n".join(f"{role}: {parent}" for role, parent in manifest.inputs.items()),
        "files": f"{len(manifest.files)}, {size(manifest.bytes)}",
        "made": f"{made.wall_seconds:.1f} s on {made.device}, commit {made.commit}{' (dirty)' if made.dirty else ''}",
    }
    out.print(rows_table(("", manifest.id), facts.items()))
    out.print(rows_table(("Metric", "Value"), manifest.summary.items()))
    out.print(rows_table(("Config", "Value"), _flat(manifest.config)))


@app.command()
def lineage(
    ref: Ref,
    direction: Annotated[Literal["up", "down", "both"], typer.Option(help="Ancestors, descendants or both.")] = "up",
    as_json: Json = False,
) -> None:
    """What an artifact was made from, back to the raw sources, or what was made from it.

    Example: fathom artifacts lineage final_rl@latest --json
    """
    store = _store()
    graph = trace(store, ref, direction)
    if as_json:
        _print_json(graph.to_json(store.tags()))
        return
    tags = _tags_by_id(store)
    inputs = {i: ", ".join(f"{e.role}={e.parent}" for e in graph.edges if e.child == i) for i in graph.nodes}
    rows = (
        (i, manifest.kind if manifest else "collected since", "\n".join(tags(i)), inputs[i])
        for i, manifest in graph.nodes.items()
    )
    console().print(rows_table(("Artifact", "Kind", "Tags", "Made from"), rows))


@app.command()
def diff(left: Ref, right: Ref, as_json: Json = False) -> None:
    """Field by field, how two artifacts' configs, inputs, results and circumstances differ.

    Example: fathom artifacts diff r1_zero@latest final_rl@latest
    """
    store = _store()
    pair = [store.manifest(store.resolve(ref)).model_dump(mode="json") for ref in (left, right)]
    parts = ("stage", "stage_version", "config", "inputs", "summary", "provenance")
    found = differences(*({part: one[part] for part in parts} for one in pair))
    if as_json:
        _print_json([{"field": path, "left": old, "right": new} for path, old, new in found])
        return
    console().print(rows_table(("Field", pair[0]["id"], pair[1]["id"]), found))


@app.command()
def tag(name: str, ref: Ref, as_json: Json = False) -> None:
    """Name an artifact; a tag that exists moves.

    Example: fathom artifacts tag r1@released final_rl@latest
    """
    artifact_id = _store().tag(name, ref)
    if as_json:
        _print_json({"tag": name, "id": artifact_id})
    else:
        console().print(f"{name} → {artifact_id}")


@app.command()
def untag(name: str, as_json: Json = False) -> None:
    """Remove a tag; the artifact stays until `gc`."""
    _store().untag(name)
    if as_json:
        _print_json({"untagged": name})
    else:
        console().print(f"untagged {name}")


@app.command()
def verify(
    refs: Annotated[list[str] | None, typer.Argument(metavar="[ID_OR_TAG]...", help="Default: all.")] = None,
    as_json: Json = False,
) -> None:
    """Compare every file with its SHA-256; exit code 5 if anything differs.

    Example: fathom artifacts verify pretrain@latest
    """
    store = _store()
    ids = [store.resolve(ref) for ref in refs] if refs else store.ids()
    faults = [fault for artifact_id in ids for fault in store.verify(artifact_id)]
    if as_json:
        rows = [{"id": fault.id, "path": fault.path, "problem": fault.problem} for fault in faults]
        _print_json({"verified": len(ids), "faults": rows})
    elif faults:
        console().print(rows_table(("Artifact", "File", "Problem"), ((f.id, f.path, f.problem) for f in faults)))
    else:
        console().print(f"{len(ids)} artifacts are what their manifests say")
    if faults:
        raise TamperedArtifact(f"{len({fault.id for fault in faults})} of {len(ids)} artifacts differ; make them again")


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Delete artifacts that no tag reaches, and what killed runs left behind.

    Example: fathom artifacts gc --dry-run
    """
    store = _store()
    doomed = store.gc(dry_run=True)
    if not dry_run:
        if doomed and not yes:
            typer.confirm(
                f"delete {len(doomed)} artifacts, {size(sum(m.bytes for m in doomed))}?", abort=True, err=True
            )
        doomed = store.gc()
    if as_json:
        rows = [{"id": manifest.id, "bytes": manifest.bytes} for manifest in doomed]
        _print_json({"deleted": not dry_run, "artifacts": rows})
        return
    title = f"{len(doomed)} artifacts {'would be ' if dry_run else ''}deleted"
    console().print(rows_table(("Artifact", "Size"), ((m.id, size(m.bytes)) for m in doomed), title))


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows
