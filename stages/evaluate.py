"""Measure a checkpoint: pass@k, maj@k, format, language and length on held-out problems, and bits per byte.

pass@1 is the mean over k samples at temperature 0.6 and top-p 0.95 (DeepSeek-R1, section 3), with 95 % bootstrap
intervals over problems. The curves of pass@k and maj@k run over k = 1, 2, 4, … up to the samples. The per-problem rows
stay in the artifact, curves included, so that two checkpoints can be compared pairwise.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import model_validator

from infra.config import Config, Field
from infra.errors import InputError
from infra.ray import spmd
from infra.stage import Context, Inputs, optional, stage
from stages.evaluation.measures import REPORT, Measure, to_json
from stages.evaluation.plots import plot_pass_and_maj
from stages.evaluation.scores import MEASURES, PROBLEM_SCHEMA, curve, problem_record, table
from stages.evaluation.text import TextJob, measure_text
from stages.problems.problem import read_problems
from stages.problems.selection import ProblemFilter
from stages.rl.prompts import Template, check_system_prompt
from stages.rl.rollout import listed, why_wrong, write_rollouts
from stages.rl.sample import SampleJob, sampled
from stages.training.checkpoint import Precision

PROBLEMS = "problems.parquet"


class EvaluateConfig(Config):
    name: str = Field(min_length=1, title="Name", description="What the checkpoint is called in the report")
    template: Template = Field(
        "chat", title="Template", description="r1_zero or r1_zero_described for models that never saw a chat"
    )
    system_prompt: str | None = Field(
        None, min_length=1, title="System prompt", description="Of template chat; what form a reply has, say"
    )
    problems: ProblemFilter = Field(ProblemFilter(), title="Problems", description="Of the held-out split")
    samples: int = Field(16, ge=1, title="Samples a problem", description="R1: 4 to 64")
    temperature: float = Field(0.6, ge=0, title="Temperature")
    top_p: float = Field(0.95, gt=0, le=1, title="Top-p")
    max_new_tokens: int = Field(64, ge=1, title="Longest reply")
    chunk: int = Field(8, ge=1, title="Problems a chunk", description="Generated together, by one seed")
    precision: Precision = Field("fp32", title="Precision", description="Of what replies; bits per byte are in fp32")
    sequence_length: int = Field(256, ge=1, title="Window", description="Context for bits per byte")
    validation_windows: int = Field(64, ge=1, title="Windows a language", description="For bits per byte")
    trigram_bytes: int = Field(10_000_000, ge=1, title="Trigram bytes", description="Its training text, a language")
    seed: int = Field(0, title="Seed")

    @model_validator(mode="after")
    def _the_template_has_a_system_turn(self) -> EvaluateConfig:
        check_system_prompt(self.template, self.system_prompt)
        return self


@stage(
    version=6,
    takes={"checkpoint": "checkpoint", "problems": "problems", "tokens": optional("tokens")},
    makes="report",
)
def evaluate(config: EvaluateConfig, inputs: Inputs, ctx: Context) -> dict:
    """Sample held-out problems k times each and, if tokens are given, compare bits per byte with a byte trigram."""
    checkpoint = str(inputs["checkpoint"].path)
    problems = config.problems.select(read_problems(inputs["problems"].path / "heldout.jsonl"))
    if not problems:
        raise InputError(f"{inputs['problems'].id} has no held-out problem of {config.problems}: widen the filter")
    job = SampleJob(
        checkpoint=checkpoint,
        problems=problems,
        samples=config.samples,
        template=config.template,
        system_prompt=config.system_prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        chunk=config.chunk,
        precision=config.precision,
    )
    grouped = list(sampled(job, ctx))
    records = [problem_record(problem, rows) for problem, rows in zip(problems, grouped, strict=True)]
    wrong = why_wrong(row for rows in grouped for row in rows)
    text: list[dict[str, Any]] = []
    if tokens := inputs.get("tokens"):
        text_job = TextJob(
            checkpoint, str(tokens.path), config.sequence_length, config.validation_windows, config.trigram_bytes
        )
        text = sorted((row for part in spmd(measure_text, text_job, ctx) for row in part), key=lambda r: r["language"])
    figures, points = table(records, config.seed), curve(records, config.seed)
    pq.write_table(pa.Table.from_pylist(records, PROBLEM_SCHEMA), ctx.out / PROBLEMS)
    write_rollouts(ctx.out / "rollouts-00000.parquet", [row for rows in grouped for row in rows[:2]])
    spent = inputs["checkpoint"].summary
    flops = sum(spent.get(name, 0.0) for name in ("train_flops", "sample_flops"))
    report = {
        "kind": "evaluation",
        "name": config.name,
        "flops": flops,
        "teacher_flops": spent.get("sample_flops", 0.0),
        "checkpoint": inputs["checkpoint"].id,
        "problems": figures,
        "wrong": wrong,
        "curve": points,
        "text": text,
        "measures": to_json(measures(figures, points, text)),
    }
    plot_pass_and_maj(ctx.out / "pass_and_maj_at_k.png", {config.name: points})
    (ctx.out / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    (ctx.out / "report.md").write_text(markdown(config, figures, points, text, wrong), encoding="utf-8")
    return summarise(config, figures, text) | {"wrong": listed(wrong)}


def measures(
    figures: list[dict[str, Any]], points: list[dict[str, Any]], text: list[dict[str, Any]]
) -> dict[str, Measure]:
    """All by name: those of all problems, pass_1 of each language and family, both curves, bits per byte."""
    found = {name: Measure.named(figures[0], name) for name in MEASURES}
    for row in figures:
        if (row["family"] == "all") != (row["language"] == "all"):
            name = row["language"] if row["family"] == "all" else row["family"]
            found[f"pass_1_{name}"] = Measure.named(row, "pass_1")
    for row in points:
        found |= {f"{name}_at_{row['k']}": Measure.named(row, name) for name in ("pass", "maj")}
    return found | {f"bits_per_byte_{row['language']}": Measure(row["bits_per_byte"]) for row in text}


def summarise(config: EvaluateConfig, figures: list[dict[str, Any]], text: list[dict[str, Any]]) -> dict:
    everything = figures[0]
    summary: dict = {"name": config.name, "samples": config.samples}
    for measure, value in everything.items():
        if measure not in ("family", "language"):
            summary[measure] = round(value, 4)
    for row in figures:
        if (row["family"] == "all") != (row["language"] == "all"):
            summary[f"pass_1_{row['language'] if row['family'] == 'all' else row['family']}"] = round(row["pass_1"], 4)
    for row in text:
        summary[f"bits_per_byte_{row['language']}"] = round(row["bits_per_byte"], 4)
        if row["trigram_bits_per_byte"] is not None:
            summary[f"trigram_bits_per_byte_{row['language']}"] = round(row["trigram_bits_per_byte"], 4)
    return summary


def markdown(
    config: EvaluateConfig,
    figures: list[dict[str, Any]],
    points: list[dict[str, Any]],
    text: list[dict[str, Any]],
    wrong: Counter[str],
) -> str:
    lines = [
        f"# {config.name}",
        "",
        f"{config.samples} samples a problem at temperature {config.temperature}, top-p {config.top_p}; "
        "95 % bootstrap intervals over problems.",
        "",
        "| family | language | problems | pass@1 | interval | any of k | consensus | format | language | length |",
        "|-|-|-|-|-|-|-|-|-|-|",
    ]
    for row in figures:
        lines.append(
            f"| {row['family']} | {row['language']} | {row['problems']} | {row['pass_1']:.3f} | "
            f"{row['pass_1_low']:.3f}–{row['pass_1_high']:.3f} | {row['pass_k']:.3f} | {row['consensus']:.3f} | "
            f"{row['format']:.3f} | {row['language_consistency']:.3f} | {row['length']:.1f} |"
        )
    if wrong:
        asked = figures[0]["problems"] * config.samples
        lines += ["", f"{wrong.total()} of {asked} answers are wrong: {listed(wrong)}."]
    lines += ["", "| k | pass@k | interval | maj@k | interval |", "|-|-|-|-|-|"]
    for row in points:
        cells = [f"{row[name]:.3f} | {row[f'{name}_low']:.3f}–{row[f'{name}_high']:.3f}" for name in ("pass", "maj")]
        lines.append(f"| {row['k']} | {' | '.join(cells)} |")
    if text:
        lines += ["", "| language | bits per byte | byte trigram | validation bytes |", "|-|-|-|-|"]
    for row in text:
        trigram = "–" if row["trigram_bits_per_byte"] is None else f"{row['trigram_bits_per_byte']:.3f}"
        lines.append(f"| {row['language']} | {row['bits_per_byte']:.3f} | {trigram} | {row['bytes']} |")
    return "\n".join(lines) + "\n"
