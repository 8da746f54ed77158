"""What a finished pipeline reports, kept beside the other results.

    fathom run line --recipe tiny
    python benchmarks/rl/reports.py tiny_line=report@latest

Each NAME=ARTIFACT is a `report`, or a single `evaluate`, of the store of the working folder: pass@1 of its checkpoints
with 95 % intervals over problems, its claims, and its file whole go to results/NAME_report.json beside this file, or
into --out. Commit, versions and device are those that the artifact was made with; `commits` and `seconds` are of all
that it was made of, which must be of the recipe as it is, from trees without changes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from flows.pipelines import pipeline
from flows.recipes import load_recipe
from infra.artifact import Artifact, Manifest
from infra.errors import InputError
from infra.lineage import lineage as lineage_of
from infra.settings import Settings
from infra.store import ArtifactStore


def made_by(artifact: Artifact, lineage: Sequence[Manifest]) -> str:
    """The command that makes the artifact. InputError unless a pipeline made it of a recipe as it is, and no part of it
    comes from a tree that no commit has."""
    if artifact.manifest.stage not in ("report", "evaluate"):
        raise InputError(f"{artifact.id} is made by {artifact.manifest.stage}: give a report or an evaluation")
    labels = artifact.manifest.provenance.labels
    if not {"pipeline", "recipe"} <= labels.keys():
        raise InputError(f"{artifact.id} was made outside a pipeline; `fathom run … --force NODE` makes it in one")
    line = pipeline(labels["pipeline"])
    paths = dict(found for part in lineage for found in paths_of(part))
    configs = load_recipe(labels["recipe"]).resolve(line, [f"{name}={json.dumps(paths[name])}" for name in paths])
    known = [(node.stage, configs[node.name].model_dump(mode="json")) for node in line.nodes]
    for part in lineage:
        if part.provenance.dirty is not False or not part.provenance.commit:
            raise InputError(f"{part.id} is of a tree that no commit is known to have: make it in a clean checkout")
        if (part.stage, part.config) not in known:
            raise InputError(f"{part.id} has values that are not those of recipe {labels['recipe']}: make it anew")
    return " ".join(["fathom run", line.name, "--recipe", labels["recipe"], *(f"--set {name}=PATH" for name in paths)])


def paths_of(part: Manifest) -> Iterator[tuple[str, str]]:
    """The settings that say where the user's own files lie, which are no recipe's: `import_base.path`."""
    node = part.provenance.labels.get("node")
    for name, values in (("path", part.config), ("source.path", part.config.get("source") or {})):
        if node and values.get("path") is not None:
            yield f"{node}.{name}", values["path"]


def rows(content: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a checkpoint, and one a claim that could be measured."""
    checkpoints = content.get("checkpoints") or [{"name": content["name"], **content["problems"][0]}]
    found = [
        {"case": row["name"], "metric": "pass@1", "ours": row["pass_1"], "anchors": {}}
        | {"low_95": row["pass_1_low"], "high_95": row["pass_1_high"], "problems": row["problems"]}
        for row in checkpoints
    ]
    return found + [
        {"case": claim["claim"], "metric": "difference", "ours": claim["difference"], "anchors": {}}
        | {"low_95": claim["low"], "high_95": claim["high"], "holds": claim["holds"]}
        for claim in content.get("claims", [])
        if claim["difference"] is not None
    ]


def keep(name: str, artifact: Artifact, store: ArtifactStore, out: Path) -> None:
    lineage = [store.manifest(artifact_id) for artifact_id in lineage_of(store, artifact.id).nodes]
    command, made = made_by(artifact, lineage), artifact.manifest.provenance
    content = json.loads((artifact.path / "report.json").read_text(encoding="utf-8"))
    record.write(
        out / f"{name}_report.json",
        command,
        rows(content),
        made.commit,
        device=made.device,
        versions=made.packages,
        artifact=artifact.id,
        commits=sorted({one.provenance.commit for one in lineage if one.provenance.commit}),
        seconds=round(sum(one.provenance.wall_seconds for one in lineage), 1),
        report=content,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifacts", nargs="+", metavar="NAME=ARTIFACT")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    settings = Settings.load()
    store = ArtifactStore(settings.store, settings.workspace)
    for asked in arguments.artifacts:
        name, _, reference = asked.partition("=")
        keep(name, store.get(reference), store, arguments.out)


if __name__ == "__main__":
    main()
