"""R1-Zero and R1 on one machine, through the stages themselves and Ray, without Prefect.

    fathom run corpus --recipe h100
    python benchmarks/rl/line.py --recipe h100

Takes `tokenize@latest` and the API reference from the store of the working folder, as `benchmarks/training/base.py`
does, and makes the nodes of the line from the base to R1, with evaluations of five of them: what is finished is reused,
what was killed goes on. Base and policy see no longer context than replies need, so the context extension is left out.
Writes results/RECIPE_line.json beside this file, or into --out, anew behind every RL run and evaluation: pass@1 and
paired gains with intervals over problems, and the curves of reward, accuracy, reply length and the rest of each RL run,
with their plots.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.training.base import curve, make
from flows.pipelines import LINE, Node
from flows.recipes import load_recipe
from infra.artifact import Artifact
from infra.settings import Settings
from infra.store import ArtifactStore
from stages.evaluation.claims import Claim, judge
from stages.report import read_evaluation

RL = ("r1_zero", "reasoning_rl", "final_rl")
GAINS = (("r1_zero", "base"), ("reasoning_rl", "cold_start"), ("r1", "base"))
NODES = (
    *("generate_problems", "pretrain", "evaluate_base"),
    *("r1_zero", "evaluate_r1_zero", "sample_zero", "cold_start_samples"),
    *("cold_start", "evaluate_cold_start", "reasoning_rl", "evaluate_reasoning_rl"),
    *("sample", "rejection_sample", "general", "sft", "final_rl", "evaluate_r1"),
)
EVALUATIONS = tuple(name for name in NODES if name.startswith("evaluate_"))


def node(name: str) -> Node:
    """The line's node, on the base before its context was extended; evaluations of problems alone."""
    found = LINE.node(name)
    inputs = {
        role: "pretrain" if source == "extend_context" else source
        for role, source in found.roles.items()
        if (found.stage, role) != ("evaluate", "tokens")
    }
    return dataclasses.replace(found, inputs=inputs)


def evaluation(name: str, artifact: Artifact) -> dict[str, Any]:
    """pass@1 of all problems as a row."""
    figures = json.loads((artifact.path / "report.json").read_text(encoding="utf-8"))["problems"]
    return {"case": f"{name}, {figures[0]['problems']} problems", "metric": "pass@1", "ours": figures[0]["pass_1"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="h100")
    parser.add_argument("--families", nargs="+", default=["countdown_wide"], help="to learn and judge")
    parser.add_argument("--set", nargs="*", default=[], metavar="NODE.FIELD=VALUE", help="as `fathom run` has it")
    parser.add_argument("--until", choices=NODES, default=NODES[-1])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="of a tree that is no checkout")
    arguments = parser.parse_args()
    settings = Settings.load()
    store = ArtifactStore(settings.store, settings.workspace)
    nodes = NODES[: NODES.index(arguments.until) + 1]
    asking = [name for name in nodes[2:] if LINE.node(name).stage in ("evaluate", "grpo", "sample")]
    families = json.dumps(arguments.families)
    chosen = [f"generate_problems.families={families}", *(f"{name}.problems.families={families}" for name in asking)]
    configs = load_recipe(arguments.recipe).resolve(LINE, [*chosen, *arguments.set])
    arguments.out.mkdir(parents=True, exist_ok=True)
    made: dict[str, Artifact] = {}
    for name in nodes:
        made[name] = make(node(name), configs[name], store, settings)
        if name in RL or name in EVALUATIONS:
            keep(made, arguments.out, f"{arguments.recipe}_line", arguments.commit)


def keep(made: Mapping[str, Artifact], out: Path, about: str, commit: str | None) -> None:
    """Write what the nodes made so far say, so that a run that is cut off leaves it."""
    reports = {name: made[name] for name in EVALUATIONS if name in made}
    rows = [
        {**evaluation(name.removeprefix("evaluate_"), artifact), "anchors": {}} for name, artifact in reports.items()
    ]
    evaluations = {(found := read_evaluation(artifact)).name: found for artifact in reports.values()}
    for left, right in GAINS:
        if {left, right} <= evaluations.keys():
            gain = judge(Claim(left=left, right=right), evaluations)
            interval = {"low_95_over_problems": gain.low, "high_95_over_problems": gain.high}
            rows.append(
                {"case": f"{left} over {right}", "metric": "pass@1", "ours": gain.difference, "anchors": interval}
            )
    for name in filter(made.get, RL):
        summary = made[name].manifest.summary
        case = f"{name}, {summary['steps']} steps"
        rows += [
            {"case": case, "metric": metric, "ours": value, "anchors": {}}
            for metric, value in {**summary, "seconds": made[name].manifest.provenance.wall_seconds}.items()
            if isinstance(value, int | float)
        ]
        shutil.copy(made[name].path / "curves.png", out / f"{about}_{name}.png")
    record.write(
        out / f"{about}.json",
        record.command("benchmarks/rl/line.py"),
        rows,
        commit,
        nodes={
            name: {"id": artifact.id, "seconds": artifact.manifest.provenance.wall_seconds, **artifact.manifest.summary}
            for name, artifact in made.items()
        },
        **{f"curve_{name}": curve(made[name]) for name in filter(made.get, RL)},
        **{
            name: json.loads((artifact.path / "report.json").read_text())["problems"]
            for name, artifact in reports.items()
        },
    )


if __name__ == "__main__":
    main()
