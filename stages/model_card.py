"""The model card of a checkpoint: what it is, what it was made of, how it was measured and where it fails.

One README.md in the layout of Hugging Face's model cards (YAML in front, with a model-index that the hub reads), beside
the plots that it shows. Every figure comes from the checkpoint, its lineage or its reports; its limitations are what
the reports measured. Nothing is written by hand but the config's few words.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any

import yaml

from infra.artifact import Artifact, Manifest
from infra.config import Config, Field
from infra.errors import InputError
from infra.lineage import Lineage
from infra.stage import Context, Inputs, many, stage
from stages.evaluation.card import SECTIONS, limitations
from stages.evaluation.measures import REPORT, joined, read_report, to_json
from stages.training.checkpoint import load_config

CARD = "README.md"


class ModelCardConfig(Config):
    name: str = Field(min_length=1, title="Name", description="Of the model, as it is released")
    license: str = Field(min_length=1, title="Licence", description="The Hugging Face identifier, such as apache-2.0")
    languages: tuple[str, ...] = Field(("en", "zh"), min_length=1, title="Languages", description="ISO 639-1")
    description: str = Field("", title="Description", description="A paragraph at the top")
    intended_use: str = Field("", title="Intended use", description="What it is for, and what not")


@stage(version=1, takes={"checkpoint": "checkpoint", "reports": many("report")}, makes="report")
def model_card(config: ModelCardConfig, inputs: Inputs, ctx: Context) -> dict:
    """Write the model card of a checkpoint from its lineage and its reports."""
    checkpoint = inputs["checkpoint"]
    reports: dict[str, dict[str, Any]] = {}
    for artifact in inputs["reports"]:
        report = read_report(artifact, checkpoint)
        if report.get("kind") not in SECTIONS:
            raise InputError(f"{artifact.id} is no evaluation, probes or benchmarks: leave it out")
        reports[artifact.id] = report
        for plot in sorted(artifact.path.glob("*.png")):
            shutil.copyfile(plot, ctx.out / _plot_name(artifact, plot.name))
    graph = ctx.lineage(checkpoint)
    model = _model(checkpoint)
    flops = sum(_flops(manifest) for manifest in graph.nodes.values() if manifest)
    measures = joined(reports)
    text = "\n".join(
        [
            _front(config, reports),
            f"# {config.name}\n",
            *([config.description, ""] if config.description else []),
            *_facts("Model", model),
            *(["## Intended use\n", config.intended_use, ""] if config.intended_use else []),
            *_data(graph),
            *_training(graph, flops),
            *(line for artifact in inputs["reports"] for line in _section(artifact, reports[artifact.id])),
            "## Limitations, as measured\n",
            *(limitations(reports.values()) or ["No report that measures a weakness was given."]),
            "",
            *_lineage(graph, checkpoint),
        ]
    )
    (ctx.out / CARD).write_text(text + "\n", encoding="utf-8")
    about = {"name": config.name, "checkpoint": checkpoint.id, "model": model, "flops": flops}
    content = about | {"measures": to_json(measures), "reports": list(reports)}
    (ctx.out / REPORT).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return {
        "name": config.name,
        "measures": len(measures),
        "reports": len(reports),
        "parameters": model["parameters"],
        "flops": flops,
        "ancestors": len(graph.nodes) - 1,
    }


def _model(checkpoint: Artifact) -> dict[str, Any]:
    shape = load_config(checkpoint.path)
    return {
        "family": shape.family,
        "parameters": shape.n_parameters(),
        "active parameters": shape.n_active_parameters(),
        "layers": shape.n_layers,
        "width": shape.d_model,
        "vocabulary": shape.vocab_size,
        "context": shape.max_position,
        "FLOPs a training token": shape.flops_per_token(shape.max_position, mtp=True),
        "KV-cache bytes a token": int(shape.cache_bytes_per_token()),
    }


def _front(config: ModelCardConfig, reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The YAML that the hub reads; an evaluation's data set is the artifact that holds it."""
    results = []
    for artifact_id, report in reports.items():
        kind = SECTIONS[report["kind"]]
        results.append(
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": kind, "type": artifact_id},
                "metrics": [
                    {"type": name, "name": f"{name} {measure}", "value": round(measure.value, 4)}
                    for name, measure in report["measures"].items()
                ],
            }
        )
    front = {
        "language": list(config.languages),
        "license": config.license,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fathom", "reasoning"],
        "model-index": [{"name": config.name, "results": results}],
    }
    return f"---\n{yaml.safe_dump(front, allow_unicode=True, sort_keys=False)}---\n"


def _facts(title: str, facts: Mapping[str, Any]) -> list[str]:
    rows = [f"| {name} | {f'{value:,}' if isinstance(value, int) else value} |" for name, value in facts.items()]
    return [f"## {title}\n", "| | |", "|-|-|", *rows, ""]


def _data(graph: Lineage) -> list[str]:
    """Shares of the mixtures that the model read, by bytes, and what became of them as tokens."""
    lines: list[str] = []
    for artifact_id, manifest in graph.nodes.items():
        summary = manifest.summary if manifest else {}
        shares = {name.removeprefix("share_"): share for name, share in summary.items() if name.startswith("share_")}
        if shares:
            lines += [f"`{artifact_id}`, {summary['documents']:,} documents, {summary['bytes']:,} bytes:", ""]
            lines += ["| language and domain | share of bytes |", "|-|-|"]
            lines += [f"| {name} | {share:.1%} |" for name, share in shares.items()] + [""]
        if (tokens := summary.get("train_tokens")) is not None:
            languages = {n.rpartition("_")[2]: c for n, c in summary.items() if n.startswith("train_tokens_")}
            told = ", ".join(f"{language} {count:,}" for language, count in languages.items())
            lines += [f"`{artifact_id}`: {tokens:,} training tokens ({told}).", ""]
    return ["## Training data\n", *lines] if lines else []


def _training(graph: Lineage, flops: float) -> list[str]:
    """One row for every ancestor that cost arithmetic, the checkpoint included."""
    rows = []
    for artifact_id, manifest in graph.nodes.items():
        if manifest and _flops(manifest):
            seen, made = manifest.summary, manifest.provenance
            cells = [f"`{artifact_id}`", seen.get("steps"), seen.get("tokens", seen.get("reply_tokens"))]
            told = ["" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells]
            rows.append(f"| {' | '.join(told)} | {_flops(manifest):.3g} | {made.wall_seconds:,.0f} s | {made.device} |")
    if not rows:
        return []
    header = ["| artifact | steps | tokens | FLOPs | time | device |", "|-|-|-|-|-|-|"]
    return ["## Training\n", f"{flops:.3g} FLOPs in all, sampling included.", "", *header, *rows, ""]


def _section(artifact: Artifact, report: Mapping[str, Any]) -> list[str]:
    """A report's measures and plots."""
    rows = [f"| {name} | {measure} |" for name, measure in report["measures"].items()]
    plots = [f"![{plot.stem}]({_plot_name(artifact, plot.name)})" for plot in sorted(artifact.path.glob("*.png"))]
    about = f"`{artifact.id}`; 95 % intervals in brackets."
    return [f"## {SECTIONS[report['kind']]}\n", about, "", "| measure | value |", "|-|-|", *rows, "", *plots, ""]


def _lineage(graph: Lineage, checkpoint: Artifact) -> list[str]:
    """Every ancestor with what it was made from, parents first."""
    parents: dict[str, list[str]] = {}
    for edge in graph.edges:
        parents.setdefault(edge.child, []).append(f"{edge.role} `{edge.parent}`")
    rows = []
    for artifact_id, manifest in graph.nodes.items():
        made = (manifest.provenance.commit or "")[:12] if manifest else "collected since"
        rows.append(f"| `{artifact_id}` | {', '.join(parents.get(artifact_id, []))} | {made} |")
    return ["## Lineage\n", "| artifact | made from | commit |", "|-|-|-|", *rows, ""]


def _flops(manifest: Manifest) -> float:
    """Of training, and of sampling where it was done: stages behind `sample` repeat its figure."""
    names = ("train_flops", *(("sample_flops",) if manifest.stage == "sample" else ()))
    return float(sum(_number(manifest.summary.get(name)) for name in names))


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else 0.0


def _plot_name(artifact: Artifact, name: str) -> str:
    return f"{artifact.id.replace('/', '_')}_{name}"
