"""Rejection sampling: a model's own right replies become conversations to train on (DeepSeek-R1, section 2.3.3).

Of the replies to a problem, those that are right, well-formed, in one language, short enough and free of code blocks
are candidates; up to `keep_per_problem` different ones stay. They come from `sample`, or are those that `grpo` kept
beside its checkpoint. The summary counts every reason to drop, in the order they are asked.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.config import Config, Field
from infra.errors import InputError
from infra.stage import Context, Inputs, one_of, stage
from stages.problems.problem import Problem
from stages.rl.rollout import read_rollouts
from stages.training.supervised import CONVERSATIONS

COLUMNS = ("problem", "completion", "tokens", "format", "accuracy", "language_consistency", "flops")


class RejectionSampleConfig(Config):
    keep_per_problem: int = Field(2, ge=1, title="Keep a problem", description="Different right replies at most")
    min_consistency: float = Field(1.0, ge=0, le=1, title="Language consistency", description="Least share that stays")
    max_tokens: int = Field(10_000, ge=1, title="Longest kept reply", description="Tokens; R1 drops long paragraphs")


@stage(version=2, takes={"rollouts": one_of("rollouts", "checkpoint")}, makes="conversations")
def rejection_sample(config: RejectionSampleConfig, inputs: Inputs, ctx: Context) -> dict:
    """Keep the right, clean and different ones of a model's replies as conversations."""
    replies: dict[str, list[dict[str, Any]]] = {}  # by problem, which several steps of a run may have asked
    for row in read_rollouts(inputs["rollouts"].path, COLUMNS):
        replies.setdefault(row["problem"], []).append(row)
    samples = sum(map(len, replies.values()))
    conversations, counts, solved = [], Counter(), 0
    for problem, rows in replies.items():
        kept, dropped = choose(rows, config)
        counts += dropped
        solved += bool(kept)
        conversations += [conversation(Problem.from_json(problem), row, number) for number, row in enumerate(kept)]
    if not conversations:
        raise InputError(f"no reply of {samples} survived ({dict(counts)}): nothing to train on")
    pq.write_table(pa.Table.from_pylist(conversations, CONVERSATIONS), ctx.out / "conversations-00000.parquet")
    return {
        "conversations": len(conversations),
        "problems": len(replies),
        "problems_solved": solved,
        "samples": samples,
        "sample_flops": sum(row["flops"] for rows in replies.values() for row in rows),
        **{f"dropped_{reason}": counts[reason] for reason in REASONS},
    }


REASONS = ("malformed", "wrong", "mixed_language", "code_block", "long", "duplicate", "enough")


def choose(rows: list[dict[str, Any]], config: RejectionSampleConfig) -> tuple[list[dict[str, Any]], Counter]:
    """(replies that stay, number of dropped ones by reason) of one problem."""
    kept: list[dict[str, Any]] = []
    dropped: Counter = Counter()
    for row in rows:
        reason = why_not(row, config)
        if reason is None and any(row["completion"] == other["completion"] for other in kept):
            reason = "duplicate"
        if reason is None and len(kept) == config.keep_per_problem:
            reason = "enough"
        if reason is None:
            kept.append(row)
        else:
            dropped[reason] += 1
    return kept, dropped


def why_not(row: dict[str, Any], config: RejectionSampleConfig) -> str | None:
    """The first reason to drop a reply, whatever the other replies say; None if there is none."""
    if row["format"] < 1:
        return "malformed"
    if row["accuracy"] < 1:
        return "wrong"
    if row["language_consistency"] < config.min_consistency:
        return "mixed_language"
    if "```" in row["completion"]:
        return "code_block"
    return "long" if row["tokens"] > config.max_tokens else None


def conversation(problem: Problem, row: dict[str, Any], number: int) -> dict[str, str]:
    messages = [{"role": "user", "content": problem.question}, {"role": "assistant", "content": row["completion"]}]
    return {
        "id": f"{problem.id}/{number}",
        "messages": json.dumps(messages, ensure_ascii=False),
        "problem": problem.to_json(),
        "language": problem.language,
        "family": problem.family,
    }
