"""k scored replies to every problem, as one SPMD program: what `sample` and `evaluate` both run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from infra.metrics import Report
from infra.ray import spmd
from infra.stage import Context
from stages.problems.problem import Problem
from stages.rl.engines import EngineName, open_engine
from stages.rl.engines.base import Sampling
from stages.rl.explore import Asking, Explorer
from stages.rl.prompts import Template
from stages.rl.rewards import RewardWeights
from stages.rl.rollout import grouped, read_rollouts
from stages.rl.rollout_store import RolloutStore
from stages.tokens.bpe import load_tokenizer
from stages.training.checkpoint import Precision, load_model
from stages.training.distributed import process_group

ROLLOUTS = "rollouts"  # folder inside scratch


@dataclasses.dataclass(frozen=True)
class SampleJob:
    """Problems are asked `chunk` at a time; a chunk owns its seed, so replies do not depend on worker counts."""

    checkpoint: str
    problems: tuple[Problem, ...]
    samples: int
    template: Template
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    engine: EngineName = "native"
    precision: Precision = "fp32"
    chunk: int = 8
    examples: tuple[Problem, ...] = ()  # shown in front of a question of the same family and language
    system_prompt: str | None = None
    store: str = ""  # folder, which `sampled` chooses


def sampled(job: SampleJob, ctx: Context) -> Iterator[list[dict[str, Any]]]:
    """Rows of `rollout.SCHEMA` for each problem of the job, in order. A run that was killed goes on where it was."""
    job = dataclasses.replace(job, store=str(ctx.scratch / ROLLOUTS))
    spmd(sample, job, ctx, keep=job.engine == "native")
    return grouped(read_rollouts(Path(job.store)))


def sample(job: SampleJob, report: Report) -> None:
    """This rank's share of the chunks, into the job's store."""
    with process_group() as ranks:
        tokenizer = load_tokenizer(job.checkpoint)
        model = load_model(job.checkpoint, str(ranks.device), job.precision)
        sampling = Sampling(job.max_new_tokens, job.temperature, job.top_p, (tokenizer.eos,))
        asking = Asking(
            job.template,
            sampling,
            job.samples,
            RewardWeights(),
            examples=job.examples,
            system_prompt=job.system_prompt,
        )
        engine = open_engine(job.engine, model, job.checkpoint)
        explorer = Explorer(engine, tokenizer, model.config, asking, RolloutStore(job.store))
        explorer.take(model.state_dict().items())
        starts = range(0, len(job.problems), job.chunk)
        for number in range(ranks.rank, len(starts), ranks.world):
            first = starts[number]
            seed = Random(f"{job.seed}/{number}").getrandbits(62)
            explorer.chunk(0, number, first, job.problems[first : first + job.chunk], seed)
            report(min(first + job.chunk * ranks.world, len(job.problems)), len(job.problems), "problems")
