"""k scored replies to every problem, as one SPMD program: what evaluation and rejection sampling both need."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import torch

from infra.metrics import Report
from stages.problems.problem import Problem
from stages.rl.engines import EngineName, open_engine
from stages.rl.engines.base import Sampling
from stages.rl.prompts import Template
from stages.rl.rewards import RewardWeights
from stages.rl.rollout import explore, forward_flops
from stages.tokens.bpe import load_tokenizer
from stages.training.checkpoint import load_model
from stages.training.distributed import process_group


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
    chunk: int = 8


def sample(job: SampleJob, report: Report) -> list[dict[str, Any]]:
    """This rank's rows of `rollout.SCHEMA`, each with the number of its problem ("problem") and its cost ("flops")."""
    with process_group() as ranks, torch.no_grad():
        tokenizer = load_tokenizer(job.checkpoint)
        model = load_model(job.checkpoint, str(ranks.device))
        engine = open_engine(job.engine, model, job.checkpoint)
        sampling = Sampling(job.max_new_tokens, job.temperature, job.top_p, (tokenizer.eos,))
        starts = range(0, len(job.problems), job.chunk)
        rows: list[dict[str, Any]] = []
        for number in range(ranks.rank, len(starts), ranks.world):
            problems = job.problems[starts[number] : starts[number] + job.chunk]
            seed = Random(f"{job.seed}/{number}").getrandbits(62)
            rollouts = explore(engine, tokenizer, problems, job.samples, job.template, sampling, seed, RewardWeights())
            rows += [
                rollout.row()
                | {
                    "problem": starts[number] + position // job.samples,
                    "flops": forward_flops(model.config, [rollout]),
                }
                for position, rollout in enumerate(rollouts)
            ]
            report(min(starts[number] + job.chunk * ranks.world, len(job.problems)), len(job.problems), "problems")
    return rows


def gather(parts: list[list[dict[str, Any]]], n_problems: int) -> list[list[dict[str, Any]]]:
    """Rows of all ranks, grouped by problem, in the problems' order."""
    grouped: list[list[dict[str, Any]]] = [[] for _ in range(n_problems)]
    for part in parts:
        for row in part:
            grouped[row["problem"]].append(row)
    return grouped
