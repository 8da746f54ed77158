"""Supervised fine-tuning: a checkpoint learns to reply, from conversations, from worked problems, or from both.

With problems alone it is R1's cold start (DeepSeek-R1, section 2.3.1): a few thousand long chains that teach the form
`<think>…</think><answer>…</answer>` before reinforcement learning.
"""

from __future__ import annotations

from infra.config import Field
from infra.errors import InputError
from infra.stage import Context, Inputs, optional, stage
from stages.problems.problem import Problem, read_problems
from stages.problems.selection import ProblemFilter
from stages.tokens.chat_template import assistant_content
from stages.training.supervised import Conversation, SupervisedConfig, fine_tune, read_conversations


class SftConfig(SupervisedConfig):
    problems: ProblemFilter = Field(ProblemFilter(), title="Problems", description="Which worked ones to learn.")


@stage(
    version=2,
    takes={"checkpoint": "checkpoint", "conversations": optional("conversations"), "problems": optional("problems")},
    makes="checkpoint",
)
def sft(config: SftConfig, inputs: Inputs, ctx: Context) -> dict:
    """Fine-tune a checkpoint on conversations, on worked problems, or on both."""
    if not (inputs.get("conversations") or inputs.get("problems")):
        raise InputError("sft needs something to learn from: give the input conversations, problems or both")
    examples: list[Conversation] = []
    if (conversations := inputs.get("conversations")) is not None:
        examples += read_conversations(conversations.path)
    if (problems := inputs.get("problems")) is not None:
        chosen = config.problems.select(read_problems(problems.path / "train.jsonl"))
        if silent := [problem.id for problem in chosen if not problem.chain]:
            raise InputError(f"{problems.id}: {silent[0]} has no worked solution; import it with a solution_field")
        examples += [worked(problem) for problem in chosen]
    return fine_tune(config, inputs["checkpoint"], examples, ctx)


def worked(problem: Problem) -> Conversation:
    """A problem with its worked chain as a conversation."""
    reply = assistant_content(problem.chain, problem.answer)
    return Conversation([{"role": "user", "content": problem.question}, {"role": "assistant", "content": reply}])
