"""The post-training claims of the line over several seeds: one base, one problem set, one pair of student
bases; fine-tuning, GRPO, rejection sampling and distillation are seeded anew.

    .venv/bin/python benchmarks/training/seeds.py --seeds 0 1 2

Each seed is an ordinary `fathom run line` in the store of the working folder, so finished stages are reused and a
killed benchmark goes on where it was. Writes results/tiny_seeds.json beside this file: a row a claim and seed, and a
row a claim with the mean over seeds and its 95 % t interval.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import record
from flows.pipelines import LINE
from infra.settings import Settings
from infra.store import ArtifactStore

SEEDED = ("sft", "grpo", "sample", "distill")
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # by degrees


def run(recipe: str, seed: int) -> dict:
    """The report of the line with this seed in every stage after the base."""
    nodes = [node.name for node in LINE.nodes if node.stage in SEEDED]
    changes = [part for node in nodes for part in ("--set", f"{node}.seed={seed}")]
    fathom = Path(sys.executable).with_name("fathom")
    subprocess.run([fathom, "run", "line", "--recipe", recipe, *changes], check=True)
    settings = Settings.load()
    report = ArtifactStore(settings.store, settings.workspace).check("report@latest")
    return json.loads((report.path / "report.json").read_text())


def rows_of(reports: dict[int, dict]) -> list[dict]:
    rows = []
    values: dict[str, list[float]] = {}
    for seed, report in reports.items():
        figures = {row["name"]: row for row in report["checkpoints"]}
        for name, row in figures.items():
            values.setdefault(f"pass_1 {name}", []).append(row["pass_1"])
        for claim in report["claims"]:
            if claim["low"] is None:
                continue
            interval = {"low_95_over_problems": claim["low"], "high_95_over_problems": claim["high"]}
            rows.append(
                {"case": claim["claim"], "metric": f"difference, seed {seed}", "ours": claim["difference"]}
                | {"holds": claim["holds"], "anchors": interval}
            )
            values.setdefault(claim["claim"], []).append(claim["difference"])
    for case, seen in values.items():
        row = {"case": case, "metric": f"mean of {len(seen)} seeds", "ours": statistics.mean(seen), "anchors": {}}
        if len(seen) > 1:
            half = T_975[len(seen) - 1] * statistics.stdev(seen) / math.sqrt(len(seen))
            row["anchors"] = {"low_95_over_seeds": row["ours"] - half, "high_95_over_seeds": row["ours"] + half}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    reports = {seed: run(arguments.recipe, seed) for seed in arguments.seeds}
    record.write(
        Path(__file__).parent / "results" / f"{arguments.recipe}_seeds.json",
        record.command("benchmarks/training/seeds.py"),
        rows_of(reports),
    )


if __name__ == "__main__":
    main()
