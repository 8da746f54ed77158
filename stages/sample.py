"""Sampling: k scored replies of a checkpoint to each of many problems, kept whole.

The replies are a `rollouts` artifact in the form of `stages/rl/rollout.py`, which rejection sampling, preference pairs,
replay and distillation read. Every chunk is on disk as soon as it is there, so a killed run asks nothing twice.

With `shots` each question comes behind worked examples: this is how R1's cold start is collected from R1-Zero
(DeepSeek-R1, section 2.3.1: few-shot prompting with a long chain of thought as an example). What is kept of a reply is
the question alone, so that who learns from it needs neither examples nor a system prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

from pydantic import model_validator

from infra.config import Config, Field
from infra.errors import InputError
from infra.stage import Context, Inputs, stage
from stages.problems.problem import Problem, read_problems
from stages.problems.selection import ProblemFilter
from stages.rl.engines import EngineName
from stages.rl.prompts import Template, check_system_prompt
from stages.rl.rollout import listed, why_wrong, write_rollouts
from stages.rl.sample import SampleJob, sampled
from stages.training.checkpoint import Precision

GROUPS_PER_FILE = 1024


class SampleConfig(Config):
    problems: ProblemFilter = Field(ProblemFilter(limit=1000), title="Problems", description="Of the training split")
    template: Template = Field("chat", title="Template")
    system_prompt: str | None = Field(
        None, min_length=1, title="System prompt", description="Of template chat; what form a reply has, say"
    )
    shots: int = Field(0, ge=0, title="Shots", description="Worked examples of a question's family in front of it")
    samples: int = Field(8, ge=1, title="Samples a problem")
    max_new_tokens: int = Field(64, ge=1, title="Longest reply")
    temperature: float = Field(1.0, ge=0, title="Temperature")
    top_p: float = Field(1.0, gt=0, le=1, title="Top-p")
    engine: EngineName = Field("native", title="Engine")
    precision: Precision = Field("fp32", title="Precision", description="Of our engine; vLLM: bf16 on CUDA")
    chunk: int = Field(8, ge=1, title="Problems a chunk", description="Generated together, by one seed")
    seed: int = Field(0, title="Seed")

    @model_validator(mode="after")
    def _the_template_has_a_system_turn(self) -> SampleConfig:
        check_system_prompt(self.template, self.system_prompt)
        return self


@stage(version=4, takes={"checkpoint": "checkpoint", "problems": "problems"}, makes="rollouts")
def sample(config: SampleConfig, inputs: Inputs, ctx: Context) -> dict:
    """Sample replies to training problems and score them."""
    problems = config.problems.select(read_problems(inputs["problems"].path / "train.jsonl"))
    if not problems:
        raise InputError(f"{inputs['problems'].id} has no training problem of {config.problems}: widen the filter")
    examples = worked_examples(problems, config.shots)
    problems = tuple(problem for problem in problems if problem not in examples)
    job = SampleJob(
        checkpoint=str(inputs["checkpoint"].path),
        problems=problems,
        samples=config.samples,
        template=config.template,
        system_prompt=config.system_prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        engine=config.engine,
        precision=config.precision,
        chunk=config.chunk,
        examples=examples,
    )
    sums = dict.fromkeys(("accuracy", "format", "language_consistency", "tokens", "flops"), 0.0)
    solved, wrong = 0, Counter[str]()
    asked = sampled(job, ctx)
    for number, groups in enumerate(iter(lambda: list(islice(asked, GROUPS_PER_FILE)), [])):
        rows = [row for group in groups for row in group]
        solved += sum(any(row["accuracy"] >= 1 for row in group) for group in groups)
        for name in sums:
            sums[name] += sum(row[name] for row in rows)
        wrong.update(why_wrong(rows))
        write_rollouts(ctx.out / f"rollouts-00000-{number:04d}.parquet", rows)
    samples = len(problems) * config.samples
    return {
        "problems": len(problems),
        "problems_solved": solved,
        "samples": samples,
        **{name: round(sums[name] / samples, 4) for name in ("accuracy", "format", "language_consistency")},
        "length": round(sums["tokens"] / samples, 2),
        "wrong": listed(wrong),
        "sample_flops": sums["flops"],
    }


def worked_examples(problems: Sequence[Problem], shots: int) -> tuple[Problem, ...]:
    """The first `shots` worked ones of each family and language. InputError where there are too few to ask any."""
    examples: list[Problem] = []
    for family, language in sorted({(problem.family, problem.language) for problem in problems}) if shots else ():
        alike = [problem for problem in problems if (problem.family, problem.language) == (family, language)]
        worked = [problem for problem in alike if problem.chain][:shots]
        if len(worked) < shots or len(alike) == shots:
            raise InputError(
                f"shots: {family} in {language} has {len(alike)} problems here, {len(worked)} of them worked; ask for "
                f"fewer than {shots}, or widen the filter"
            )
        examples += worked
    return tuple(examples)
