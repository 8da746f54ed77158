"""A recipe's base model on one machine, through the stages themselves and Ray, without Prefect: pre-training, then the
context extension.

    fathom run corpus --recipe h100
    python benchmarks/training/base.py --recipe h100

Takes `tokenize@latest` from the store of the working folder and leaves the artifacts there that `fathom run base` would
leave: what is finished is reused, what was killed goes on from its last checkpoint. Writes results/RECIPE_base.json
beside this file, or into --out: speed and quality of both, the loss curve, the routing's health, loss by length and the
needle map, and the stages' plots beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from statistics import mean
from typing import Any

import stages
from benchmarks import record
from flows.pipelines import LINE, Node
from flows.recipes import load_recipe
from infra import stage as running
from infra.artifact import Artifact
from infra.config import Config
from infra.metrics import METRICS, Progress, read_metrics
from infra.settings import Settings
from infra.store import ArtifactStore

NODES = ("pretrain", "extend_context")
SAID_EVERY = 5.0  # seconds
POINTS = 200  # of the loss curve that is kept


def make(node: Node, config: Config, store: ArtifactStore, settings: Settings) -> Artifact:
    """The node's artifact, made or reused, and tagged as a pipeline tags it."""
    said = 0.0

    def say(progress: Progress) -> None:
        nonlocal said
        if time.monotonic() - said > SAID_EVERY:
            said = time.monotonic()
            print(f"{node.name}: {progress}", flush=True)

    roles = {role: f"{source}@latest" for role, source in node.roles.items()}
    result = running.run(stages.load(node.stage), config, roles, store, settings, on_progress=say)
    store.tag(f"{node.name}@latest", result.artifact.id)
    print(f"{node.name}: {'reused' if result.reused else 'made'} {result.artifact.id}", flush=True)
    return result.artifact


def rows_of(node: str, artifact: Artifact) -> list[dict[str, Any]]:
    """The summary's figures as rows of the record."""
    summary = artifact.manifest.summary
    size = f"{summary['parameters'] / 1e6:.0f}M ({summary['active_parameters'] / 1e6:.0f}M active)"
    case = f"{node} {size}, {summary['tokens'] / 1e6:.0f}M tokens"
    return [
        {"case": case, "metric": name, "ours": value, "anchors": {}}
        for name, value in summary.items()
        if isinstance(value, int | float) and not name.endswith("_start")
    ]


def curve(artifact: Artifact) -> list[dict[str, float]]:
    """The metrics of a run in at most POINTS rows: means over a row's steps, and the step that ends it."""
    metrics = read_metrics(artifact.path / METRICS)
    size = -(-len(metrics) // POINTS)
    points = []
    for begin in range(0, len(metrics), size):
        steps = metrics[begin : begin + size]
        names = dict.fromkeys(name for step in steps for name in step if name not in ("step", "time"))
        means = {name: mean(step[name] for step in steps if name in step) for name in names}
        points.append({"step": steps[-1]["step"], "time": steps[-1]["time"], **means})
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="h100")
    parser.add_argument("--set", nargs="*", default=[], metavar="NODE.FIELD=VALUE", help="as `fathom run` has it")
    parser.add_argument("--until", choices=NODES, default=NODES[-1])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="of a tree that is no checkout")
    arguments = parser.parse_args()
    settings = Settings.load()
    store = ArtifactStore(settings.store, settings.workspace)
    configs = load_recipe(arguments.recipe).resolve(LINE, arguments.set)
    made = {}
    for node in NODES[: NODES.index(arguments.until) + 1]:
        made[node] = make(LINE.node(node), configs[node], store, settings)

    name = f"{arguments.recipe}_base"
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = {f"curve_{node}": curve(artifact) for node, artifact in made.items()}
    for node, artifact in made.items():
        for plot in artifact.path.glob("*.png"):
            shutil.copy(plot, arguments.out / f"{name}_{node}_{plot.name}")
        for report in ("routing_health", "report"):
            if (path := artifact.path / f"{report}.json").exists():
                kept[f"{report}_{node}"] = json.loads(path.read_text())
    for row in kept.get("routing_health_pretrain", {"rows": []})["rows"]:
        del row["load"]  # every expert's: in the plot
    record.write(
        arguments.out / f"{name}.json",
        record.command("benchmarks/training/base.py"),
        [row for node, artifact in made.items() for row in rows_of(node, artifact)],
        arguments.commit,
        **kept,
    )


if __name__ == "__main__":
    main()
