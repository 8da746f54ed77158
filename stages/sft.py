"""Supervised fine-tuning: a checkpoint learns to reply, from conversations, from worked problems, or from both.

With problems alone it is R1's cold start (DeepSeek-R1, section 2.3.1): a few thousand long chains that teach the form
`<think>…</think><answer>…</answer>` before reinforcement learning. With conversations and general ones beside them it
is the fine-tuning of the base on 600K reasoning and 200K other samples (section 2.3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from infra.config import Field
from infra.errors import InputError
from infra.stage import Context, Inputs, optional, stage
from stages.problems.problem import Problem, read_problems
from stages.problems.selection import ProblemFilter
from stages.rl.prompts import worked_turns
from stages.training.supervised import Conversation, SupervisedConfig, fine_tune, read_conversations


class SftConfig(SupervisedConfig):
    problems: ProblemFilter = Field(ProblemFilter(), title="Problems", description="Which worked ones to learn.")
    general_share: float = Field(
        0.25, gt=0, lt=1, title="General share", description="Of all conversations, where general ones are given; as R1"
    )


@stage(
    version=2,
    takes={
        "checkpoint": "checkpoint",
        "conversations": optional("conversations"),
        "problems": optional("problems"),
        "general": optional("conversations"),
    },
    makes="checkpoint",
)
def sft(config: SftConfig, inputs: Inputs, ctx: Context) -> dict:
    """Fine-tune a checkpoint on conversations, on worked problems, or on both, and on a share of general ones."""
    if not (inputs.get("conversations") or inputs.get("problems")):
        raise InputError("sft needs something to learn from: give the input conversations, problems or both")
    examples: list[Conversation] = []
    if (conversations := inputs.get("conversations")) is not None:
        examples += read_conversations(conversations.path)
    if (problems := inputs.get("problems")) is not None:
        chosen = config.problems.select(read_problems(problems.path / "train.jsonl"))
        if silent := [problem.id for problem in chosen if not (problem.chain and problem.answer)]:
            raise InputError(f"{problems.id}: {silent[0]} has no worked solution; import it with a solution_field")
        examples += [worked(problem) for problem in chosen]
    if (general := inputs.get("general")) is None:
        return fine_tune(config, inputs["checkpoint"], examples, ctx)
    wanted = round(len(examples) * config.general_share / (1 - config.general_share))
    drawn, passes = draw(read_conversations(general.path), wanted, config.seed)
    summary = fine_tune(config, inputs["checkpoint"], [*examples, *drawn], ctx)
    return summary | {"general_conversations": wanted, "general_passes": passes}


def draw(pool: Sequence[Conversation], n: int, seed: int) -> tuple[list[Conversation], float]:
    """(n of the pool in a seeded order, how often it was read): all of it as often as n asks for, then a part."""
    order = list(pool)
    Random(seed).shuffle(order)
    whole, rest = divmod(n, len(order))
    return order * whole + order[:rest], round(n / len(order), 3)


def worked(problem: Problem) -> Conversation:
    """A problem with its worked chain as a conversation."""
    return Conversation(worked_turns(problem))
