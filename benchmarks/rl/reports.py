"""What a finished pipeline reports, kept beside the other results.

    fathom run line --recipe tiny
    python benchmarks/rl/reports.py tiny_line=report@latest

Each NAME=ARTIFACT is a `report`, or a single `evaluate`, of the store of the working folder: pass@1 of its checkpoints
with 95 % intervals over problems, its claims, and its file whole go to results/NAME_report.json beside this file, or
into --out. Commit, versions and device are those that the artifact was made with; `seconds` is the sum over all that it
was made of.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import record
from infra.artifact import Artifact, Manifest
from infra.errors import InputError
from infra.settings import Settings
from infra.store import ArtifactStore


def ancestors(manifest: Manifest, store: ArtifactStore) -> dict[str, Manifest]:
    """It, and all that it was made of, by id."""
    found, open_ = {manifest.id: manifest}, [manifest]
    while open_:
        for artifact_id in open_.pop().inputs.values():
            if artifact_id not in found:
                found[artifact_id] = store.manifest(artifact_id)
                open_.append(found[artifact_id])
    return found


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
    made = artifact.manifest.provenance
    if artifact.manifest.stage not in ("report", "evaluate"):
        raise InputError(f"{artifact.id} is made by {artifact.manifest.stage}: give a report or an evaluation")
    if made.dirty:
        raise InputError(f"{artifact.id} comes from a tree with changes that no commit has: commit, and make it anew")
    content = json.loads((artifact.path / "report.json").read_text(encoding="utf-8"))
    lineage = ancestors(artifact.manifest, store).values()
    record.write(
        out / f"{name}_report.json",
        f"fathom run {made.labels.get('pipeline', 'line')} --recipe {made.labels.get('recipe', 'tiny')}",
        rows(content),
        made.commit,
        device=made.device,
        versions=made.packages,
        artifact=artifact.id,
        commits=sorted({one.provenance.commit or "unknown" for one in lineage}),
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
