"""`fathom promote` as a user types it: the tag, or the requirement that failed and an exit code of its own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from infra.artifact import Manifest, Provenance, recipe_id
from infra.store import ArtifactStore


@pytest.mark.slow
def test_a_checkpoint_is_tagged_or_refused_with_the_figure(
    fathom: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    store = ArtifactStore(tmp_path / "store")

    def commit(stage: str, kind: str, inputs: dict[str, str], name: str, text: str) -> str:
        made = Manifest(
            **{"id": recipe_id(stage, 1, {}, inputs), "kind": kind, "stage": stage, "stage_version": 1, "config": {}},
            **{"inputs": inputs, "summary": {}, "provenance": Provenance(), "files": (), "created": datetime.now(UTC)},
        )
        with store.draft(made.id) as (out, _):
            (out / name).write_text(text)
            return store.tag(f"{stage}@latest", store.commit(out, made).id)

    checkpoint = commit("pretrain", "checkpoint", {}, "model.json", "{}")
    report = {"checkpoint": checkpoint, "measures": {"pass_1": {"value": 0.6, "low": 0.5, "high": 0.7}}}
    commit("evaluate", "report", {"checkpoint": checkpoint}, "report.json", json.dumps(report))
    given = ("promote", "pretrain@latest", "r1@released", "--report", "evaluate@latest", "--require")

    refused = fathom(*given, "pass_1 >= 0.51")
    output, _ = refused.communicate(timeout=300)
    assert refused.returncode == 9, output
    assert "pass_1 >= 0.51 fails: 0.5 of 0.600 [0.500, 0.700]" in " ".join(output.split())
    assert "r1@released" not in store.tags()

    passed = fathom(*given, "pass_1 >= 0.5")
    output, _ = passed.communicate(timeout=300)
    assert passed.returncode == 0, output
    assert store.resolve("r1@released") == checkpoint
    assert store.get("r1@released.verdict").summary["promoted"]
