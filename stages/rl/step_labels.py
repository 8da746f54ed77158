"""How right each step of a reply is, found by going on from it (Math-Shepherd, 2312.08935, section 3).

A policy completes a reply from the end of each step a few times. The share of completions that come to a right answer
labels the step; the last step ends with the reply's own answer, whose verdict is its label. A prefix that several
replies to a problem share is completed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

from infra.errors import InputError
from infra.metrics import Report
from stages.problems.problem import Problem
from stages.rl.engines import EngineName, open_engine
from stages.rl.engines.base import Engine, Sampling
from stages.rl.judges import step_ends
from stages.rl.prompts import reply_text
from stages.rl.rewards import accuracy_reward
from stages.rl.rollout_store import RolloutStore
from stages.rl.steps import split_steps
from stages.tokens.bpe import Tokenizer, load_tokenizer
from stages.training.checkpoint import Precision, load_model
from stages.training.distributed import process_group

Row = dict[str, Any]  # of rollout.SCHEMA


@dataclass(frozen=True)
class LabelJob:
    """Replies are labelled `chunk` at a time; a chunk owns its seed, so labels do not depend on worker counts."""

    checkpoint: str
    rows: tuple[Row, ...]
    completions: int
    max_new_tokens: int
    temperature: float
    top_p: float
    engine: EngineName
    precision: Precision
    chunk: int
    seed: int
    store: str  # folder; a run that was killed finds its finished chunks there


def label(job: LabelJob, report: Report) -> None:
    """This rank's share of the chunks, with `step_ends` and `step_rewards`, into the job's store."""
    with process_group() as ranks:
        tokenizer = load_tokenizer(job.checkpoint)
        model = load_model(job.checkpoint, str(ranks.device), job.precision)
        engine = open_engine(job.engine, model, job.checkpoint)
        sampling = Sampling(job.max_new_tokens, job.temperature, job.top_p, (tokenizer.eos,))
        store = RolloutStore(job.store)
        starts = range(0, len(job.rows), job.chunk)
        for number in range(ranks.rank, len(starts), ranks.world):
            rows = job.rows[starts[number] : starts[number] + job.chunk]
            seed = Random(f"{job.seed}/{number}").getrandbits(62)
            key = f"{seed}"  # all else that labels are a function of is in the artifact's id, which the folder is for
            if store.get(0, number, key) is None:
                store.put(0, number, key, labelled(rows, engine, tokenizer, sampling, job.completions, seed))
            report(min(starts[number] + job.chunk * ranks.world, len(job.rows)), len(job.rows), "replies")


def labelled(
    rows: Sequence[Row], engine: Engine, tokenizer: Tokenizer, sampling: Sampling, completions: int, seed: int
) -> list[Row]:
    """The rows with the token that ends each step and the step's label."""
    if other := [row["problem_id"] for row in rows if reply_text(row["reply_ids"], tokenizer) != row["completion"]]:
        raise InputError(
            f"the reply to {other[0]} reads otherwise by the checkpoint's tokenizer: label with the model that sampled "
            "it, or with one of the same tokenizer"
        )
    cut = [split_steps(row["completion"]) for row in rows]
    prefixes = {key: row for row, steps in zip(rows, cut, strict=True) for key in _prefixes(row, steps)}
    prompts = [[*row["prompt_ids"], *tokenizer.encode(text)] for (_, text), row in prefixes.items()]
    replies = engine.generate([prompt for prompt in prompts for _ in range(completions)], sampling, seed)
    shares: dict[tuple[str, str], float] = {}
    for number, ((problem, prefix), row) in enumerate(prefixes.items()):
        asked = Problem.from_json(row["problem"])
        tails = replies[number * completions : (number + 1) * completions]
        right = sum(accuracy_reward(asked, prefix + reply_text(tail.tokens, tokenizer)) for tail in tails)
        shares[problem, prefix] = right / completions
    return [
        row
        | {
            "step_ends": step_ends(row["reply_ids"], steps, tokenizer),
            "step_rewards": [*(shares[key] for key in _prefixes(row, steps)), row["accuracy"]],
        }
        for row, steps in zip(rows, cut, strict=True)
    ]


def _prefixes(row: Row, steps: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(problem, what was said) at the end of each step but the last."""
    return ((row["problem_id"], said) for said in accumulate(steps[:-1]))
