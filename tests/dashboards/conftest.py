"""A store with a small line in it, made by stages of the test's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.config import Config
from infra.settings import Settings
from infra.stage import Context, Inputs, run, stage
from infra.store import ArtifactStore


class IngestConfig(Config):
    n: int = 3


@stage(version=1, makes="documents")
def ingest(config: IngestConfig, inputs: Inputs, ctx: Context) -> dict[str, Any]:
    rows = {"id": [f"d{i}" for i in range(config.n)], "text": [f"文档 number {i}" for i in range(config.n)]}
    pq.write_table(pa.table(rows), ctx.out / "documents-00000.parquet")
    return {"documents": config.n}


class PretrainConfig(Config):
    learning_rate: float = 0.01
    steps: int = 20


@stage(version=1, takes={"documents": "documents"}, makes="checkpoint")
def pretrain(config: PretrainConfig, inputs: Inputs, ctx: Context) -> dict[str, Any]:
    for step in range(1, config.steps + 1):
        loss = float("nan") if step == 2 else config.learning_rate / step
        ctx.report(step, config.steps, "steps", loss=loss)
    (ctx.out / "model.json").write_text(json.dumps({"d_model": 64}))
    return {"loss": loss, "parameters": 1_234_567}


class EvaluateConfig(Config):
    pass


@stage(version=1, takes={"checkpoint": "checkpoint"}, makes="report")
def evaluate(config: EvaluateConfig, inputs: Inputs, ctx: Context) -> dict[str, Any]:
    Image.new("RGB", (30, 20), "teal").save(ctx.out / "plot.png")
    (ctx.out / "report.md").write_text("# Scores\n\n![scores](plot.png)\n[elsewhere](https://example.org/plot.png)\n")
    (ctx.out / "page.html").write_text("<script>alert(1)</script>")
    return {"accuracy": 0.5, "note": "<b>bold</b>"}


class Line(NamedTuple):
    """Ids of a line: documents → base and other (two checkpoints) → report of the base."""

    store: ArtifactStore
    documents: str
    base: str
    other: str
    report: str


@pytest.fixture
def line(tmp_path: Path) -> Line:
    store = ArtifactStore(tmp_path / "store")
    settings = Settings(workers=1)
    documents = run(ingest, IngestConfig(), {}, store, settings).artifact.id
    base = run(pretrain, PretrainConfig(), {"documents": documents}, store, settings).artifact.id
    other = run(pretrain, PretrainConfig(learning_rate=0.02), {"documents": documents}, store, settings).artifact.id
    report = run(evaluate, EvaluateConfig(), {"checkpoint": base}, store, settings).artifact.id
    store.tag("base@latest", base)
    return Line(store, documents, base, other, report)
