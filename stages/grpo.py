"""Reinforcement learning from verifiable rewards: GRPO (DeepSeekMath, section 4; DeepSeek-R1, sections 2.2 and 2.3).

From a base model with a template `r1_zero` this is R1-Zero; from the cold start with `chat` and a language reward it
is R1's reasoning stage; with reward models and general prompts, its last one over all scenarios (section 2.3.4): rules
judge the problems, the reward models and the form the general prompts. `loss` takes one of GRPO's successors
instead, or PPO with a critic; DAPO is `dapo` with `dynamic_sampling`, the reward `overlong` and no KL term. Renewing
the reference is the iterative GRPO of DeepSeekMath, section 4.1.4; its process supervision takes a process model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from pydantic import model_validator

from infra.config import Config, Field
from infra.errors import ConfigError, InputError
from infra.ray import spmd
from infra.stage import Context, Inputs, optional, stage
from stages.evaluation.plots import Panel, plot_curves
from stages.problems.problem import Language, Problem, read_problems
from stages.problems.selection import ProblemFilter
from stages.rl import emergence
from stages.rl.algorithms import ALGORITHMS, AlgorithmName
from stages.rl.credit import StepCredit
from stages.rl.critic import CriticConfig
from stages.rl.engines import EngineName
from stages.rl.general import open_problems
from stages.rl.learner import ROLLOUTS, GrpoJob, learn
from stages.rl.policy_loss import KlEstimator, PolicyObjective
from stages.rl.prompts import Template, check_system_prompt, prompt_ids
from stages.rl.reward_model import load_target
from stages.rl.rewards import JUDGED, PENALTIES, PREFERENCE_MODELS, RewardWeights
from stages.rl.rollout_store import RolloutStore
from stages.tokens.bpe import load_tokenizer
from stages.training.checkpoint import Precision, load_config

JUDGES = (*PREFERENCE_MODELS.values(), "process_reward_model")  # inputs


class GrpoConfig(Config):
    """Defaults are sized for two CPU cores; the papers' figures stand in the descriptions.

    At a few million parameters many questions with few replies each learn more from the same number of tokens than
    few questions with many: the noise is between questions.
    """

    name: str = Field("", title="Name", description="What the checkpoint is called in reports")
    template: Template = Field(
        "chat", title="Template", description="Of base models: r1_zero our own, r1_zero_described published ones"
    )
    system_prompt: str | None = Field(
        None, min_length=1, title="System prompt", description="Of template chat; what form a reply has, say"
    )
    problems: ProblemFilter = Field(ProblemFilter(), title="Problems", description="Which of them to learn from")
    target_language: Language | None = Field(None, title="Target language", description="None: the question's own")
    rewards: RewardWeights = Field(RewardWeights(), title="Rewards")

    steps: int = Field(60, ge=1, title="Steps", description="Explorations")
    groups_per_step: int = Field(32, ge=1, title="Questions a step", description="R1-Zero: 32")
    group_size: int = Field(8, ge=2, title="Replies a question", description="R1-Zero: 16, DeepSeekMath: 64")
    general_groups: int = Field(
        0, ge=0, title="General questions a step", description="Of the questions a step; from the input general"
    )
    rollout_groups: int = Field(16, ge=1, title="Questions a chunk", description="Generated together by one worker")
    dynamic_sampling: int = Field(
        0, ge=0, title="Dynamic sampling", description="Rounds in which others replace groups of equal rewards; 0: off"
    )
    updates_per_exploration: int = Field(1, ge=1, title="Updates an exploration")
    max_new_tokens: int = Field(64, ge=1, title="Longest reply", description="R1-Zero: 32768, then 65536")
    temperature: float = Field(1.0, gt=0, title="Temperature")

    learning_rate: float = Field(2e-4, ge=0, title="Learning rate", description="R1-Zero: 3e-6, DeepSeekMath: 1e-6")
    warmup_steps: int = Field(0, ge=0, title="Warm-up steps")
    weight_decay: float = Field(0.0, ge=0, title="Weight decay")
    max_gradient_norm: float = Field(1.0, gt=0, title="Gradient clip")
    loss: AlgorithmName = Field(
        "grpo", title="Loss", description="Advantages, ratio, clips and mean, as its paper has them"
    )
    clip: float | None = Field(
        None, gt=0, le=1, title="Ratio clip", description="ε; acts from the second update on; none: the loss's own"
    )
    clip_high: float | None = Field(
        None, gt=0, title="Upper ratio clip", description="ε_high (DAPO: 0.28); none: the ratio clip, or the loss's own"
    )
    supervision: Literal["outcome", "process"] = Field(
        "outcome",
        title="Supervision",
        description="process: steps are rewarded too, by a process reward model; alone where rewards has no weights",
    )
    step_credit: StepCredit = Field(
        "sum",
        title="Step credit",
        description="Of supervision process. sum: a token is given the scores of all steps to come (DeepSeekMath); "
        "progress: what its own step changed of the score",
    )
    progress_weight: float = Field(
        2.5, gt=0, title="Progress weight", description="α of step_credit progress, in advantages of the outcome"
    )
    critic: CriticConfig = Field(CriticConfig(), title="Critic", description="Of loss ppo")
    staleness: Literal[0, 1] = Field(
        0, title="Staleness", description="1: replies are generated while the update before is learnt, by older weights"
    )
    importance_cap: float = Field(
        0.0, ge=0, title="Importance cap", description="Weigh tokens by learner/engine, at most this; 0: off"
    )
    max_mismatch_kl: float | None = Field(
        0.1, gt=0, title="Largest mismatch", description="KL of engine and learner, nats a token, that ends the run"
    )
    kl_coefficient: float = Field(0.001, ge=0, title="KL coefficient", description="R1-Zero: 0.001, DeepSeekMath: 0.04")
    kl_estimator: KlEstimator = Field("k3", title="KL estimator")
    reference_renew_every: int = Field(400, ge=0, title="Renew reference every", description="Steps; 0: never")

    engine: EngineName = Field("native", title="Engine")
    precision: Precision = Field(
        "fp32", title="Precision", description="Of activations and products; bf16 weights keep fp32 masters"
    )
    micro_batch_tokens: int = Field(8192, ge=1, title="Tokens a micro-batch", description="Padded; bounds the memory")
    save_every: int = Field(10, ge=1, title="Save every", description="Steps between resume points")
    keep_rollouts_every: int = Field(10, ge=0, title="Keep rollouts every", description="Steps, and the last; 0: none")
    seed: int = Field(0, title="Seed")

    @property
    def languages(self) -> tuple[Language, ...]:
        return self.problems.languages

    @property
    def objective(self) -> PolicyObjective:
        """The loss's own, with the clips and the KL term that the config sets."""
        own = ALGORITHMS[self.loss].objective
        return dataclasses.replace(
            own,
            clip_low=self.clip or own.clip_low,
            clip_high=self.clip_high or self.clip or own.clip_high,
            kl_coefficient=self.kl_coefficient,
            kl=self.kl_estimator,
        )

    def keeps(self, step: int) -> bool:
        """Whether the artifact has the rollouts of step `step`, from 1: of the first, every so many, and the last."""
        every = self.keep_rollouts_every
        return bool(every) and ((step - 1) % every == 0 or step == self.steps)

    @model_validator(mode="after")
    def _the_template_has_a_system_turn(self) -> GrpoConfig:
        check_system_prompt(self.template, self.system_prompt)
        return self

    @model_validator(mode="after")
    def _the_options_fit_the_loss(self) -> GrpoConfig:
        if self.loss == "online_rft" and (
            self.rewards != RewardWeights(accuracy=1, format=0, language=0) or self.dynamic_sampling
        ):
            raise ValueError(
                "loss=online_rft learns each right reply alike: set rewards to accuracy 1, format 0, language 0, "
                "and leave dynamic_sampling at 0"
            )
        if self.loss == "online_rft" and self.supervision == "process":
            raise ValueError("loss=online_rft learns whole replies: leave supervision at outcome")
        if self.loss == "ppo" and self.dynamic_sampling:
            raise ValueError("loss=ppo learns without contrast in a group too: leave dynamic_sampling at 0")
        if self.step_credit != "sum" and self.supervision == "outcome":
            raise ValueError(f"step_credit={self.step_credit} is for steps: set supervision to process")
        own = type(self).model_fields["progress_weight"].default
        if self.progress_weight != own and self.step_credit != "progress":
            raise ValueError("progress_weight is set, but nothing is credited by progress: set step_credit to progress")
        if self.critic != CriticConfig() and self.loss != "ppo":
            raise ValueError(f"critic is set, but loss={self.loss} has none: set loss to ppo")
        return self

    @model_validator(mode="after")
    def _general_questions_have_a_reward(self) -> GrpoConfig:
        if self.general_groups and not (self.rewards.preference or self.rewards.harmlessness):
            raise ValueError(
                "general_groups asks questions without right answers: set rewards.preference or rewards.harmlessness, "
                "and give the model of each"
            )
        if self.general_groups >= self.groups_per_step:
            raise ValueError(
                f"general_groups={self.general_groups} leaves no problem of groups_per_step={self.groups_per_step}: "
                "lower it"
            )
        return self

    @model_validator(mode="after")
    def _late_replies_are_corrected(self) -> GrpoConfig:
        if self.staleness and not self.importance_cap:
            raise ValueError(
                "staleness=1 learns from another policy's replies: set importance_cap to correct it, say 2"
            )
        return self

    @model_validator(mode="after")
    def _chunks_fill_a_step(self) -> GrpoConfig:
        if self.groups_per_step % self.rollout_groups:
            raise ValueError(
                f"rollout_groups={self.rollout_groups} must divide groups_per_step={self.groups_per_step}: "
                "chunks are dealt out to the workers whole"
            )
        return self


@stage(
    version=5,
    takes={
        "checkpoint": "checkpoint",
        "problems": "problems",
        "general": optional("conversations", "preferences"),
        "reward_model": optional("reward_model"),
        "harmlessness_model": optional("reward_model"),
        "process_reward_model": optional("reward_model"),
    },
    makes="checkpoint",
)
def grpo(config: GrpoConfig, inputs: Inputs, ctx: Context) -> dict:
    """Improve a checkpoint by group relative policy optimisation on problems with exact answers, and on general prompts
    that reward models judge."""
    judges = {role: str(inputs[role].path) for role in JUDGES if role in inputs}
    check_judges(config, judges)
    general, said = general_problems(config, inputs)
    problems = config.problems.select(read_problems(inputs["problems"].path / "train.jsonl"))
    if not problems:
        raise InputError(f"{inputs['problems'].id} has no training problem of {config.problems}: widen the filter")
    job = GrpoJob(config, str(inputs["checkpoint"].path), problems, str(ctx.out), str(ctx.scratch), judges, general)
    workers = min(ctx.workers, config.groups_per_step // config.rollout_groups)
    done = spmd(learn, job, ctx, workers=workers, keep=config.engine == "native")[0]
    rows = [{"step": step, **row} for step, row in enumerate(done, start=1)]
    RolloutStore(ctx.scratch / ROLLOUTS).copy(ctx.out, config.keeps)
    drawn = [panel for panel in PANELS if any(name in rows[0] for name in panel.series)]
    plot_curves(ctx.out / "curves.png", rows, drawn)
    return {"name": config.name or "grpo", **summarise(rows), **said}


def general_problems(config: GrpoConfig, inputs: Inputs) -> tuple[tuple[Problem, ...], dict[str, int]]:
    """The general prompts that are asked, and what the summary says of them; none where the input is not given.

    Raises ConfigError where only one of input and `general_groups` is, and InputError where no prompt can be asked.
    """
    if bool(config.general_groups) != ("general" in inputs):
        raise ConfigError("grpo: input general and general_groups > 0 go together: give both or neither")
    if "general" not in inputs:
        return (), {}
    checkpoint = inputs["checkpoint"].path
    tokenizer, room = load_tokenizer(checkpoint), load_config(checkpoint).max_position - config.max_new_tokens
    found, others = open_problems(
        inputs["general"],
        config.languages,
        fits=lambda question: len(prompt_ids(question, config.template, tokenizer, (), config.system_prompt)) <= room,
    )
    if not found:
        raise InputError(
            f"{inputs['general'].id} has no prompt in {' or '.join(config.languages)} of at most {room} tokens that "
            "begins a conversation: give others, or lower max_new_tokens"
        )
    return found, {"general_prompts": len(found), "general_left_out": others}


def check_judges(config: GrpoConfig, judges: Mapping[str, str]) -> None:
    """Raise ConfigError where the models that are given are not those that the config asks for."""
    rewards = config.rewards
    asked = {
        "reward_model": (rewards.preference > 0, "rewards.preference > 0", ("response", "answer")),
        "harmlessness_model": (rewards.harmlessness > 0, "rewards.harmlessness > 0", ("response",)),
        "process_reward_model": (config.supervision == "process", "supervision=process", ("steps",)),
    }
    for role, (wanted, by, targets) in asked.items():
        if wanted != (role in judges):
            raise ConfigError(f"grpo: input {role} and {by} go together: give both or neither")
        if wanted and (target := load_target(judges[role])) not in targets:
            raise ConfigError(f"grpo: input {role} judges the {target}: give one of target {' or '.join(targets)}")


PANELS = (
    Panel("Reward", ("reward",)),
    Panel("Accuracy", ("accuracy", "accuracy_en", "accuracy_zh")),
    Panel("Format and language", ("format", "language")),
    Panel("Penalties", tuple(PENALTIES)),
    Panel("Points of the reward models", JUDGED),
    Panel("Loss of the critic", ("value_loss",)),
    Panel("Reply length, tokens", ("length",)),
    Panel("Reflection words a reply", ("reflections",)),
    Panel("Share of replies that verify or backtrack", ("verification", "backtracking")),
    Panel("Entropy, nats a token", ("entropy",)),
    Panel("KL to the reference and to the engine", ("kl", "mismatch_kl")),
)


def summarise(rows: list[dict]) -> dict:
    """First and last values, each the mean of a tenth of the steps (one step is a noisy sample), and the totals."""
    tenth = max(1, len(rows) // 10)
    summary: dict = {"steps": len(rows), "train_flops": rows[-1]["flops"]}
    summary["reply_tokens"] = int(sum(row["reply_tokens"] for row in rows))
    points = [name for name in JUDGED if name in rows[0]]
    for name in ("reward", "accuracy", "format", "language", "length", "entropy", *emergence.MEASURES, *points):
        summary[f"{name}_first"] = round(sum(row[name] for row in rows[:tenth]) / tenth, 4)
        summary[f"{name}_last"] = round(sum(row[name] for row in rows[-tenth:]) / tenth, 4)
    summary["kl_last"] = round(sum(row["kl"] for row in rows[-tenth:]) / tenth, 6)
    summary["mismatch_kl_max"] = max(row["mismatch_kl"] for row in rows)
    summary["mismatch_max_ratio"] = max(row["mismatch_max_ratio"] for row in rows)
    return summary
