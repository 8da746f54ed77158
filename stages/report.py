"""The report of a whole line: every evaluated checkpoint in one table, and the claims with their verdicts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq

from infra.artifact import Artifact
from infra.config import Config, Field
from infra.errors import InputError
from infra.stage import Context, Inputs, many, stage
from stages.evaluate import PROBLEMS
from stages.evaluation.claims import Claim, Evaluation, Rise, Verdict, judge, judge_rise, judge_text
from stages.evaluation.plots import plot_intervals, plot_pass_and_maj

DEFAULT_CLAIMS = (
    Claim(left="reasoning_rl", right="cold_start", margin=0.10),
    Claim(left="r1", right="r1", measure="consensus", right_measure="pass_1", strict=False),
    Claim(left="distilled_llama", right="rl_only_llama"),
)
DEFAULT_RISES = (Rise(after="reasoning_rl", before="cold_start"),)


class ReportConfig(Config):
    title: str = Field("The line", title="Title")
    claims: tuple[Claim, ...] = Field(DEFAULT_CLAIMS, title="Claims", description="Between evaluations, by name")
    rises: tuple[Rise, ...] = Field(DEFAULT_RISES, title="Rises", description="Claims that Maj@k rose beyond Pass@k")


@stage(version=2, takes={"evaluations": many("report")}, makes="report")
def report(config: ReportConfig, inputs: Inputs, ctx: Context) -> dict:
    """Put all evaluations of a line side by side and decide the claims from their per-problem rows."""
    evaluations: dict[str, Evaluation] = {}
    for artifact in inputs["evaluations"]:
        evaluation = read_evaluation(artifact)
        if evaluation.name in evaluations:
            raise InputError(f"two evaluations are named {evaluation.name!r}: give each evaluate stage its own name")
        evaluations[evaluation.name] = evaluation
    verdicts = [judge(claim, evaluations) for claim in config.claims]
    verdicts += [judge_rise(rise, evaluations) for rise in config.rises]
    verdicts += [verdict for evaluation in evaluations.values() for verdict in judge_text(evaluation)]
    rows = [{"name": e.name, **e.figures[0]} for e in evaluations.values()]
    content = {
        "title": config.title,
        "checkpoints": rows,
        "curves": [{"name": e.name, **row} for e in evaluations.values() for row in e.curve],
        "text": [{"name": e.name, **row} for e in evaluations.values() for row in e.text],
        "claims": [dataclasses.asdict(verdict) for verdict in verdicts],
    }
    (ctx.out / "report.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    (ctx.out / "report.md").write_text(markdown(config.title, evaluations, verdicts), encoding="utf-8")
    plot_intervals(
        ctx.out / "pass_at_1.png",
        [row["name"] for row in rows],
        [(row["pass_1"], row["pass_1_low"], row["pass_1_high"]) for row in rows],
        "pass@1 with 95 % bootstrap intervals",
    )
    plot_pass_and_maj(ctx.out / "pass_and_maj_at_k.png", {e.name: e.curve for e in evaluations.values()})
    best = max(rows, key=lambda row: row["pass_1"])
    return {
        "name": config.title,
        "checkpoints": len(rows),
        "claims": len(verdicts),
        "claims_held": sum(verdict.holds for verdict in verdicts),
        "best": best["name"],
        "best_pass_1": round(best["pass_1"], 4),
    }


def read_evaluation(artifact: Artifact) -> Evaluation:
    """An evaluation's files; InputError if the artifact is a report of another kind."""
    if not (artifact.path / PROBLEMS).is_file():
        raise InputError(f"{artifact.id} is no evaluation (it has no {PROBLEMS}): give artifacts of the stage evaluate")
    content = json.loads((artifact.path / "report.json").read_text(encoding="utf-8"))
    records = {row["problem_id"]: row for row in pq.read_table(artifact.path / PROBLEMS).to_pylist()}
    return Evaluation(
        content["name"],
        records,
        content["problems"],
        content["text"],
        content["curve"],
        content["flops"],
        content["teacher_flops"],
    )


def markdown(title: str, evaluations: Mapping[str, Evaluation], verdicts: list[Verdict]) -> str:
    lines = [
        f"# {title}",
        "",
        "| checkpoint | problems | pass@1 | 95 % interval | consensus | format | language | length | last FLOPs |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    for evaluation in evaluations.values():
        row = evaluation.figures[0]
        lines.append(
            f"| {evaluation.name} | {row['problems']} | {row['pass_1']:.3f} | "
            f"{row['pass_1_low']:.3f}–{row['pass_1_high']:.3f} | {row['consensus']:.3f} | {row['format']:.3f} | "
            f"{row['language_consistency']:.3f} | {row['length']:.1f} | {evaluation.flops:.2g} |"
        )
    lines += ["", "| claim | holds | difference | 95 % interval | |", "|-|-|-|-|-|"]
    for verdict in verdicts:
        interval = "" if verdict.low is None else f"{verdict.low:+.3f} to {verdict.high:+.3f}"
        difference = "" if verdict.difference is None else f"{verdict.difference:+.3f}"
        lines.append(
            f"| {verdict.claim} | {'yes' if verdict.holds else 'no'} | {difference} | {interval} | {verdict.note} |"
        )
    for measure in ("pass", "maj"):
        ks = sorted({row["k"] for evaluation in evaluations.values() for row in evaluation.curve})
        lines += ["", f"{measure}@k", "", f"| checkpoint | {' | '.join(map(str, ks))} |", "|-" * (len(ks) + 1) + "|"]
        for evaluation in evaluations.values():
            points = {row["k"]: f"{row[measure]:.3f}" for row in evaluation.curve}
            lines.append(f"| {evaluation.name} | {' | '.join(points.get(k, '–') for k in ks)} |")
    families = sorted({row["family"] for e in evaluations.values() for row in e.figures} - {"all"})
    names = list(evaluations)
    lines += ["", "pass@1 by family", "", f"| family | {' | '.join(names)} |", "|-" * (len(names) + 1) + "|"]
    for family in families:
        cells = [_pass_1(evaluations[name].figures, family) for name in names]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _pass_1(figures: list[dict[str, Any]], family: str) -> str:
    found = [row["pass_1"] for row in figures if row["family"] == family and row["language"] == "all"]
    return f"{found[0]:.3f}" if found else "–"
