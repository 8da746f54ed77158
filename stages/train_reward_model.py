"""A preference reward model (Bradley–Terry), as DeepSeek-R1 trains for what no rule can judge (section 2.3.4).

It begins as a checkpoint with a new scalar head, or goes on from a reward model: then a share of what it learns from is
replayed from earlier preferences, as in DeepSeekMath's iterative GRPO (section 4.1.4), so that it does not forget what
the policy used to say.
"""

from __future__ import annotations

from typing import Literal

from infra.config import Field
from infra.errors import ConfigError, InputError
from infra.stage import Context, Inputs, Role, one_of, stage
from stages.corpus.document import fraction
from stages.rl.pairs import Pair, encode_pairs
from stages.rl.preference_tasks import BradleyTerry
from stages.rl.preferences import Preference, hold_out, read_preferences
from stages.rl.reward_model import load_target
from stages.tokens.bpe import load_tokenizer
from stages.training.checkpoint import load_config
from stages.training.examples import ExamplesConfig, ExamplesJob, launch_examples, summarize_examples


class TrainRewardModelConfig(ExamplesConfig):
    target: Literal["response", "answer"] = Field(
        "response", title="Target", description="answer: without the chain, R1's helpfulness; response: harmlessness."
    )
    replay_share: float = Field(
        0.1, title="Replay share", description="Of the pairs, where replay is given; DeepSeekMath: 0.1.", ge=0, lt=1
    )


@stage(
    version=1,
    takes={
        "checkpoint": one_of("checkpoint", "reward_model"),
        "preferences": "preferences",
        "replay": Role(("preferences",), optional=True, many=True),
    },
    makes="reward_model",
)
def train_reward_model(config: TrainRewardModelConfig, inputs: Inputs, ctx: Context) -> dict:
    """Train a model that gives chosen replies more reward than rejected ones."""
    checkpoint = inputs["checkpoint"]
    if checkpoint.kind == "reward_model" and (judges := load_target(checkpoint.path)) != config.target:
        raise ConfigError(
            f"target: {checkpoint.id} judges the {judges}; set target={judges}, or begin with a checkpoint"
        )
    tokenizer = load_tokenizer(checkpoint.path)

    def encoded(preferences: list[Preference]) -> list[Pair]:
        return encode_pairs(preferences, tokenizer, config.max_tokens, config.target)

    preferences = read_preferences(inputs["preferences"].path)
    new, held = map(encoded, hold_out(preferences, config.heldout_share, config.seed))
    if not new:
        raise InputError(
            f"none of {len(preferences)} pairs is left to learn from, judged by the {config.target}: raise max_tokens, "
            "lower heldout_share or change target"
        )
    earlier = [pair for artifact in inputs.get("replay", ()) for pair in read_preferences(artifact.path)]
    earlier.sort(key=lambda pair: fraction(pair.id, f"replay {config.seed}"))
    old, old_held = map(encoded, hold_out(earlier, config.heldout_share, config.seed))
    replayed = old[: round(len(new) * config.replay_share / (1 - config.replay_share))]
    job = ExamplesJob(
        task=BradleyTerry(str(checkpoint.path), tokenizer.pad, config.target),
        config=config,
        model=load_config(checkpoint.path),
        train=[*new, *replayed],
        heldout={"heldout": held, **({"replay_heldout": old_held} if earlier else {})},
        out=str(ctx.out),
        scratch=str(ctx.scratch),
    )
    summary = summarize_examples(job, launch_examples(job, ctx))
    return summary | {"target": config.target, "pairs": len(preferences), "replayed": len(replayed)}
