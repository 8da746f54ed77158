"""Probe a checkpoint for what DeepSeek-R1 names as its weaknesses: languages, examples, JSON, tools, several turns.

Every case is asked once. Intervals are over the contents of problems, as those of `evaluate` are, for the same numbers
may be asked about in both languages. `stages.evaluation.probes` says what the cases are and how they are judged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from infra.config import Config, Field
from infra.errors import InputError
from infra.ray import spmd
from infra.stage import Context, Inputs, stage
from stages.evaluation.ask import AskJob, ask
from stages.evaluation.measures import REPORT, Measure, to_json
from stages.evaluation.plots import plot_intervals
from stages.evaluation.probes import Material, build, judge, measures
from stages.problems.problem import read_problems
from stages.problems.selection import ProblemFilter
from stages.rl.prompts import Template
from stages.training.checkpoint import Precision


class ProbeConfig(Config):
    name: str = Field(min_length=1, title="Name", description="What the checkpoint is called in the report")
    template: Template = Field(
        "chat", title="Template", description="r1_zero or r1_zero_described for models that never saw a chat"
    )
    problems: ProblemFilter = Field(ProblemFilter(), title="Problems", description="Of both splits")
    cases: int = Field(50, ge=1, title="Cases", description="Of each probe and language")
    shots: int = Field(3, ge=1, title="Shots", description="Worked problems before the question")
    temperature: float = Field(0.6, ge=0, title="Temperature")
    top_p: float = Field(0.95, gt=0, le=1, title="Top-p")
    max_new_tokens: int = Field(64, ge=1, title="Longest reply")
    precision: Precision = Field("fp32", title="Precision", description="Of what replies; bf16 is faster on a GPU")
    seed: int = Field(0, title="Seed")


@stage(version=4, takes={"checkpoint": "checkpoint", "problems": "problems"}, makes="report")
def probe(config: ProbeConfig, inputs: Inputs, ctx: Context) -> dict:
    """Measure language mixing, few-shot sensitivity, JSON output, function calling and multi-turn follow-ups."""
    splits = {
        split: config.problems.select(read_problems(inputs["problems"].path / f"{split}.jsonl"))
        for split in ("heldout", "train")
    }
    if not splits["heldout"]:
        raise InputError(f"{inputs['problems'].id} has no held-out problem of {config.problems}: widen the filter")
    cases = build(Material(splits["heldout"], splits["train"], config.cases, config.shots, config.seed))
    job = AskJob(
        checkpoint=str(inputs["checkpoint"].path),
        conversations=tuple((case.messages, case.tools, case.language) for case in cases),
        template=config.template,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        precision=config.precision,
    )
    replies = sorted((said for part in spmd(ask, job, ctx) for said in part), key=lambda said: said.number)
    verdicts = [judge(case, said.text) for case, said in zip(cases, replies, strict=True)]
    found = measures(cases, verdicts, config.seed)
    with (ctx.out / "replies.jsonl").open("w", encoding="utf-8") as file:
        for case, said, verdict in zip(cases, replies, verdicts, strict=True):
            row = {"probe": case.probe, "pair": case.pair, "language": case.language, "messages": case.messages}
            row |= {"reply": said.text, "tokens": said.tokens, "finished": said.finished, "verdict": verdict}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    too_long = sum(said.tokens == 0 for said in replies)
    about = {"kind": "probes", "name": config.name, "checkpoint": inputs["checkpoint"].id, "cases": len(cases)}
    report = about | {"too_long": too_long, "measures": to_json(found)}
    (ctx.out / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    (ctx.out / "report.md").write_text(markdown(config, found, too_long), encoding="utf-8")
    whole = {name: measure for name, measure in found.items() if not name.endswith(("_en", "_zh"))}
    plot_intervals(
        ctx.out / "probes.png",
        list(whole),
        [(measure.value, measure.low or 0.0, measure.high or 0.0) for measure in whole.values()],
        f"Probes of {config.name}, shares and differences with 95 % intervals",
    )
    finished = sum(said.finished for said in replies) / len(replies)
    return {
        "name": config.name,
        "cases": len(cases),
        **{name: round(measure.value, 4) for name, measure in whole.items()},
        "finished": round(finished, 4),
        "too_long": too_long,
    }


def markdown(config: ProbeConfig, found: Mapping[str, Measure], too_long: int) -> str:
    lines = [
        f"# Probes of {config.name}",
        "",
        f"One reply a case at temperature {config.temperature}, top-p {config.top_p}; up to {config.cases} cases of "
        f"each probe and language, {config.shots} examples in a few-shot prompt. 95 % bootstrap intervals over "
        "contents, paired for gains. "
        f"{too_long} prompts left no room for a reply in the context and count as failed.",
        "",
        "| measure | all | English | Chinese |",
        "|-|-|-|-|",
    ]
    for name in found:
        if not name.endswith(("_en", "_zh")):
            cells = [str(found[key]) if key in found else "–" for key in (name, f"{name}_en", f"{name}_zh")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
