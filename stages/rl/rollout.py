"""Exploring: groups of replies to each question, read back, scored, and written so that a kill cannot tear a file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model.config import ModelConfig
from stages.problems.problem import Language, Problem
from stages.rl.engines.base import Engine, Sampling
from stages.rl.prompts import Template, prompt_ids, reply_text
from stages.rl.rewards import PENALTIES, RewardWeights, Score, score
from stages.tokens.bpe import Tokenizer

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("problem_id", pa.string()),
        ("family", pa.string()),
        ("language", pa.string()),
        ("level", pa.int32()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("tokens", pa.int32()),  # of the completion, EOS included
        ("finished", pa.bool_()),
        ("reward", pa.float64()),
        ("accuracy", pa.float64()),
        ("format", pa.float64()),
        ("language_consistency", pa.float64()),
        *((name, pa.float64()) for name in PENALTIES),
        ("advantage", pa.float64()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One scored reply. `logprobs` are the engine's, one for each token of `tokens`."""

    problem: Problem
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    finished: bool
    text: str
    score: Score

    def row(self, step: int = 0, advantage: float = 0.0) -> dict[str, Any]:
        return {
            "step": step,
            "problem_id": self.problem.id,
            "family": self.problem.family,
            "language": self.problem.language,
            "level": self.problem.level,
            "prompt": self.problem.question,
            "completion": self.text,
            "tokens": len(self.tokens),
            "finished": self.finished,
            "reward": self.score.reward,
            "accuracy": self.score.accuracy,
            "format": self.score.format,
            "language_consistency": self.score.language,
            **{name: self.score.rules[name] for name in PENALTIES},
            "advantage": advantage,
        }


def explore(
    engine: Engine,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    group_size: int,
    template: Template,
    sampling: Sampling,
    seed: int,
    weights: RewardWeights,
    target_language: Language | None = None,
) -> list[Rollout]:
    """`group_size` scored replies to each problem, a problem's replies side by side."""
    prompts = [prompt_ids(problem.question, template, tokenizer) for problem in problems]
    asked = [(problem, prompt) for problem, prompt in zip(problems, prompts, strict=True) for _ in range(group_size)]
    replies = engine.generate([prompt for _, prompt in asked], sampling, seed)
    rollouts = []
    for (problem, prompt), reply in zip(asked, replies, strict=True):
        text = reply_text(reply.tokens, tokenizer)
        length = len(reply.tokens), sampling.max_new_tokens
        verdict = score(problem, text, reply.finished, weights, target_language, *length)
        rollouts.append(Rollout(problem, prompt, reply.tokens, reply.logprobs, reply.finished, text, verdict))
    return rollouts


def write_rollouts(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows of `SCHEMA` to a Parquet file that is there whole or not at all, also after a power cut."""
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def forward_flops(config: ModelConfig, rollouts: Iterable[Rollout]) -> float:
    """FLOPs of one forward pass over prompts and replies: what generating them costs, and a third of learning them."""
    lengths = [len(rollout.prompt) + len(rollout.tokens) for rollout in rollouts]
    return sum(length * config.flops_per_token(length) / 3 for length in lengths)
