"""Rejection sampling: a model's own right replies become conversations to train on (DeepSeek-R1, section 2.3.3).

Of the replies to a problem, those that are right and readable (well-formed, in one language, without code blocks, long
paragraphs and repeats) are candidates; up to `keep_per_problem` different ones stay. They come from `sample`, or are
those that `grpo` kept beside its checkpoint; replies to general prompts, none of which is right, are left out. The
summary counts every reason to drop, in the order they are asked.

DeepSeek-V3 takes over R1's reasoning by the same stage (section 5.1): replies behind a system prompt that asks to
reflect, then the shortest right ones of the expert that was made of them.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from infra.config import Config, Field
from infra.errors import InputError
from infra.stage import Context, Inputs, one_of, stage
from stages.problems.problem import Problem
from stages.rl.rewards import chain_of
from stages.rl.rollout import read_rollouts
from stages.training.supervised import CONVERSATIONS

COLUMNS = (
    *("problem", "completion", "tokens", "flops"),
    *("format", "accuracy", "language_consistency", "repetition"),
)


class RejectionSampleConfig(Config):
    keep_per_problem: int = Field(2, ge=1, title="Keep a problem", description="Different right replies at most")
    min_consistency: float = Field(1.0, ge=0, le=1, title="Language consistency", description="Least share that stays")
    max_tokens: int = Field(10_000, ge=1, title="Longest kept reply", description="Tokens")
    max_paragraph: int = Field(2000, ge=1, title="Longest paragraph", description="Characters between line breaks")
    max_repetition: float = Field(
        0.5, ge=0, le=1, title="Repetition", description="Largest share of four-grams that were said before"
    )
    prefer: Literal["first", "shortest"] = Field(
        "first", title="Prefer", description="Which right replies stay; V3 has R1's made concise: shortest"
    )
    system_prompt: str | None = Field(
        None, min_length=1, title="System prompt", description="Before each kept question; V3 marks R1's replies so"
    )


@stage(version=2, takes={"rollouts": one_of("rollouts", "checkpoint")}, makes="conversations")
def rejection_sample(config: RejectionSampleConfig, inputs: Inputs, ctx: Context) -> dict:
    """Keep the right, clean and different ones of a model's replies as conversations."""
    replies: dict[str, list[dict[str, Any]]] = {}  # by problem, which several steps of a run may have asked
    for row in read_rollouts(inputs["rollouts"].path, COLUMNS):
        if row["accuracy"] is not None:  # of an open problem nothing is right
            replies.setdefault(row["problem"], []).append(row)
    samples = sum(map(len, replies.values()))
    conversations, counts, solved = [], Counter(), 0
    for problem, rows in replies.items():
        kept, dropped = choose(rows, config)
        counts += dropped
        solved += bool(kept)
        asked = Problem.from_json(problem)
        conversations += [conversation(asked, row, number, config.system_prompt) for number, row in enumerate(kept)]
    if not conversations:
        raise InputError(
            f"no reply of {samples} to problems with right answers survived ({dict(counts)}; those to general prompts "
            "are left out): nothing to train on"
        )
    pq.write_table(pa.Table.from_pylist(conversations, CONVERSATIONS), ctx.out / "conversations-00000.parquet")
    return {
        "conversations": len(conversations),
        "problems": len(replies),
        "problems_solved": solved,
        "samples": samples,
        "sample_flops": sum(row["flops"] for rows in replies.values() for row in rows),
        **{f"dropped_{reason}": counts[reason] for reason in REASONS},
    }


REASONS = (
    *("malformed", "wrong", "mixed_language", "code_block", "long_paragraph", "repetitive", "long"),
    *("duplicate", "enough"),
)


def choose(rows: list[dict[str, Any]], config: RejectionSampleConfig) -> tuple[list[dict[str, Any]], Counter]:
    """(replies that stay, number of dropped ones by reason) of one problem."""
    kept: list[dict[str, Any]] = []
    dropped: Counter = Counter()
    for row in sorted(rows, key=lambda row: row["tokens"]) if config.prefer == "shortest" else rows:
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
    if "```" in chain_of(row["completion"]):  # an answer may be a program
        return "code_block"
    if max(map(len, row["completion"].splitlines()), default=0) > config.max_paragraph:
        return "long_paragraph"
    if row["repetition"] > config.max_repetition:
        return "repetitive"
    return "long" if row["tokens"] > config.max_tokens else None


def conversation(problem: Problem, row: dict[str, Any], number: int, system: str | None = None) -> dict[str, str]:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": problem.question}, {"role": "assistant", "content": row["completion"]}]
    return {
        "id": f"{problem.id}/{number}",
        "messages": json.dumps(messages, ensure_ascii=False),
        "problem": problem.to_json(),
        "language": problem.language,
        "family": problem.family,
    }
