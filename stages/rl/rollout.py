"""One scored reply, and the one form in which replies lie on disk: a run's store, the rollouts of `grpo` and `sample`.

A row holds all that was sampled (tokens, the engine's log-probabilities) and said of it (rewards), and the problem
itself, so that replay, rejection sampling, preferences and distillation need nothing else. Advantages are left out:
they are functions of the rewards of a group (`advantages.py`) or of a critic.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.errors import InputError
from model.config import ModelConfig
from stages.problems.problem import Problem
from stages.rl.rewards import JUDGED, RULES, Score

FILES = "rollouts-*.parquet"
# What is said of a reply → its column. None where nothing was said: no model judged it, or its problem is open.
COLUMNS = {name: "language_consistency" if name == "language" else name for name in (*RULES, *JUDGED)}
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),  # of reinforcement learning, from 1; 0 where nothing was learnt
        ("group", pa.int32()),  # number of the question in the step
        ("sample", pa.int32()),  # number of the reply in the group: with step and group, which reply this is
        ("problem_id", pa.string()),
        ("family", pa.string()),
        ("language", pa.string()),
        ("level", pa.int32()),
        ("problem", pa.string()),  # as `Problem.to_json` has it
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("tokens", pa.int32()),  # of the completion, EOS included
        ("finished", pa.bool_()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("reply_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),  # the engine's, of each of reply_ids
        ("reward", pa.float64()),
        *((column, pa.float64()) for column in COLUMNS.values()),
        ("reason", pa.string()),  # why the answer is wrong; null if it is right
        ("step_ends", pa.list_(pa.int32())),  # which of reply_ids ends each step that a process model has scored
        ("step_rewards", pa.list_(pa.float64())),
        ("flops", pa.float64()),  # of sampling it
    ]
)
LATE = ("reason", "harmlessness")  # columns that files of earlier versions do not have: null there


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One scored reply. `logprobs` are the engine's, one for each token of `tokens`, in fp32; `steps` the token at
    which each step ends and its reward, if steps are rewarded."""

    problem: Problem
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    finished: bool
    text: str
    score: Score
    steps: tuple[tuple[int, float], ...] = ()

    def row(self, step: int = 0, group: int = 0, sample: int = 0, flops: float = 0.0) -> dict[str, Any]:
        return {
            "step": step,
            "group": group,
            "sample": sample,
            "problem_id": self.problem.id,
            "family": self.problem.family,
            "language": self.problem.language,
            "level": self.problem.level,
            "problem": self.problem.to_json(),
            "prompt": self.problem.question,
            "completion": self.text,
            "tokens": len(self.tokens),
            "finished": self.finished,
            "prompt_ids": self.prompt,
            "reply_ids": self.tokens,
            "logprobs": self.logprobs,
            "reward": self.score.reward,
            **{column: self.score.rules.get(name) for name, column in COLUMNS.items()},
            "reason": self.score.reason or None,
            "step_ends": [end for end, _ in self.steps],
            "step_rewards": [reward for _, reward in self.steps],
            "flops": flops,
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Rollout:
        """The rollout that a row of `SCHEMA` was made of."""
        return cls(
            Problem.from_json(row["problem"]),
            row["prompt_ids"],
            row["reply_ids"],
            row["logprobs"],
            row["finished"],
            row["completion"],
            Score(
                row["reward"],
                {name: row[col] for name, col in COLUMNS.items() if row[col] is not None},
                row["reason"] or "",
            ),
            tuple(zip(row["step_ends"], row["step_rewards"], strict=True)),
        )


def write_rollouts(path: Path, rows: Iterable[dict[str, Any]], key: str = "") -> None:
    """Write rows of `SCHEMA` to a Parquet file that is there whole or not at all, also after a power cut.

    `key` says what the replies are a function of; it lies in the file's metadata.
    """
    draft = path.with_suffix(".draft")
    table = pa.Table.from_pylist(list(rows), SCHEMA.with_metadata({"key": key}))
    with draft.open("wb") as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_rollouts(folder: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of `SCHEMA` (or these columns of them) of all rollouts in an artifact or a store, by step and group.

    InputError where there is none, or where a file of rollouts is damaged.
    """
    paths = sorted(folder.glob(FILES))
    if not paths:
        raise InputError(
            f"{folder} holds no {FILES}: give a rollouts artifact (stage sample), or a checkpoint of grpo that kept "
            "its rollouts (keep_rollouts_every)"
        )
    for path in paths:
        try:
            table = read_table(path, columns)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: not a file of rollouts, or damaged ({error})") from error
        yield from table.to_pylist()


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """These columns of `SCHEMA` (or all) in a file; `LATE` ones are null in a file of before."""
    wanted, own = columns or SCHEMA.names, pq.read_schema(path).names
    late = [name for name in LATE if name in wanted and name not in own]
    there = [name for name in wanted if name not in late]
    table = pq.read_table(path, columns=there, page_checksum_verification=True)
    for name in late:
        table = table.append_column(name, pa.nulls(len(table), SCHEMA.field(name).type))
    return table


def why_wrong(rows: Iterable[dict[str, Any]]) -> Counter[str]:
    """How many answers are wrong for each reason, without its details: no "NameError" behind "error"."""
    return Counter(row["reason"].partition(":")[0] for row in rows if row["reason"])


def listed(counts: Counter[str]) -> str:
    """The most frequent first: "wrong answer 9, timeout 2"."""
    return ", ".join(f"{what} {count}" for what, count in counts.most_common())


def grouped(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The replies to one question after those to the other, as they lie."""
    for _, group in itertools.groupby(rows, key=lambda row: (row["step"], row["group"])):
        yield list(group)


def forward_flops(config: ModelConfig, rollouts: Sequence[Rollout], head: bool = True) -> float:
    """FLOPs of one forward pass over prompts and replies: what generating them costs, and a third of learning them. A
    value model has no `head` over the vocabulary."""
    lengths = [len(rollout.prompt) + len(rollout.tokens) for rollout in rollouts]
    per_token = config.flops_per_token if head else config.non_embedding_flops_per_token
    return sum(length * per_token(length) / 3 for length in lengths)
