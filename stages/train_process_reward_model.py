"""A process reward model: it scores each step of a reply (Math-Shepherd, 2312.08935; DeepSeekMath, section 4.1.3).

Cross-entropy at the end of every step, against the labels of `label_steps`. It begins as a checkpoint with a new scalar
head, or goes on from a process reward model. `heldout_order` is the share of pairs of replies to one held-out problem
that it puts in the order of their labels: accuracy alone may mean that it knows which problems are hard.
"""

from __future__ import annotations

import itertools
from typing import Literal

from infra.config import Field
from infra.errors import ConfigError, InputError
from infra.stage import Context, Inputs, one_of, stage
from stages.corpus.document import fraction
from stages.problems.problem import Problem
from stages.rl.preference_tasks import Chain, Steps
from stages.rl.reward_model import load_target, place_steps
from stages.rl.rollout import read_rollouts
from stages.rl.step_order import order
from stages.rl.steps import split_steps
from stages.tokens.bpe import load_tokenizer
from stages.training.checkpoint import load_config
from stages.training.examples import ExamplesConfig, ExamplesJob, launch_examples, summarize_examples

ENDS = {"": "mean", "_low": "low", "_high": "high"}


class TrainProcessRewardModelConfig(ExamplesConfig):
    labels: Literal["soft", "hard"] = Field(
        "soft", title="Labels", description="soft: the share of right completions; hard: 1 if any was right."
    )


@stage(
    version=2,
    takes={"checkpoint": one_of("checkpoint", "reward_model"), "rollouts": "rollouts"},
    makes="reward_model",
)
def train_process_reward_model(config: TrainProcessRewardModelConfig, inputs: Inputs, ctx: Context) -> dict:
    """Train a model that tells how likely each step of a reply is right."""
    checkpoint, rollouts = inputs["checkpoint"], inputs["rollouts"]
    if checkpoint.kind == "reward_model" and load_target(checkpoint.path) != "steps":
        raise ConfigError(f"{checkpoint.id} judges whole replies: begin with a checkpoint or a process reward model")
    tokenizer = load_tokenizer(checkpoint.path)
    train: list[Chain] = []
    heldout: dict[tuple[str, str], list[Chain]] = {}  # by content and question
    replies = 0
    for row in read_rollouts(rollouts.path):
        replies += 1
        problem, labels = Problem.from_json(row["problem"]), row["step_rewards"]
        if not labels:
            raise InputError(f"{rollouts.id}: the steps of its replies have no labels; make them with label_steps")
        if config.labels == "hard":
            labels = [float(share > 0) for share in labels]
        chain = Chain(*place_steps(problem.question, split_steps(row["completion"]), tokenizer), labels)
        assert len(chain.places) == len(labels), (row["completion"], labels)
        if len(chain) <= config.max_tokens:
            # By content: a problem's twin in the other language is on the same side.
            held = fraction(problem.content, f"steps {config.seed}") < config.heldout_share
            (heldout.setdefault((problem.content, problem.question), []) if held else train).append(chain)
    if not train:
        raise InputError(f"none of {replies} replies is left to learn from: raise max_tokens or lower heldout_share")
    job = ExamplesJob(
        task=Steps(str(checkpoint.path), tokenizer.pad),
        config=config,
        model=load_config(checkpoint.path),
        train=train,
        heldout={"heldout": list(itertools.chain.from_iterable(heldout.values()))},
        out=str(ctx.out),
        scratch=str(ctx.scratch),
    )
    summary = summarize_examples(job, launch_examples(job, ctx))
    if ordered := order(str(ctx.out), heldout, ctx):
        summary |= {f"heldout_order{end}": round(getattr(ordered, name), 4) for end, name in ENDS.items()}
    return summary | {"target": "steps", "replies": replies, "steps_learnt": sum(len(chain.places) for chain in train)}
