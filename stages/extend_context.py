"""Context extension by YaRN (2309.00071) in phases of growing length, as DeepSeek-V2 and V3 do (V3, section 4.3).

Each phase scales the rotary frequencies by its `rope_factor` over the *pre-training* length and trains shortly on
longer windows at the rate where pre-training ended. V3: 1000 steps at 32K, then 1000 at 128K, s = 40, α = 1, β = 32,
attention factor 0.1·ln s + 1. The report holds the loss by position before and after.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from infra.config import Config, Field
from infra.errors import ConfigError
from infra.ray import spmd
from infra.stage import Context, Inputs, stage
from model.config import ModelConfig
from stages.training.checkpoint import load_config
from stages.training.data import TokenWindows
from stages.training.job import Optimization, TrainJob, TrainResult
from stages.training.launch import launch, summarize
from stages.training.plots import plot_bins, plot_losses
from stages.training.schedules import LearningRate
from stages.training.validation import PositionLoss, Validation, loss_by_position


class Phase(Config):
    """Some steps at one length. rope_factor is s of YaRN, relative to the length of pre-training."""

    sequence_length: int = Field(title="Sequence length", ge=2)
    rope_factor: float = Field(title="YaRN scale s", gt=1)
    steps: int = Field(title="Steps", ge=1)
    batch_size: int = Field(title="Batch size", description="Sequences a step, over all workers.", ge=1)


class ExtendContextConfig(Optimization):
    phases: tuple[Phase, ...] = Field(title="Phases", min_length=1)
    beta_fast: float = Field(32.0, title="YaRN β", gt=0)
    beta_slow: float = Field(1.0, title="YaRN α", gt=0)
    learning_rate: LearningRate = Field(LearningRate(schedule="constant", peak=3e-4), title="Learning rate")
    mtp_weight: float = Field(0.1, title="MTP weight λ", description="V3's at the end of pre-training.", ge=0)
    bias_update_speed: float = Field(0.0, title="Bias update speed γ", description="V3 ends with 0.", ge=0)
    micro_batch_size: int = Field(4, title="Micro-batch", description="Most rows of one forward pass of a rank.", ge=1)
    validation_windows: int = Field(8, title="Validation windows", description="Per language.", ge=1)

    def models(self, base: ModelConfig) -> list[ModelConfig]:
        """The model of each phase. Raises ConfigError where lengths do not grow or outrun their rope_factor."""
        original = base.original_max_position if base.rope_factor > 1 else base.max_position
        lengths = [base.max_position, *(phase.sequence_length for phase in self.phases)]
        if any(after <= before for before, after in pairwise(lengths)):
            raise ConfigError(f"phases: lengths must grow beyond {base.max_position}, got {lengths[1:]}")
        return [
            base.replace(
                max_position=phase.sequence_length,
                original_max_position=original,
                rope_factor=phase.rope_factor,
                beta_fast=self.beta_fast,
                beta_slow=self.beta_slow,
            )
            for phase in self.phases
        ]


@stage(version=2, takes={"checkpoint": "checkpoint", "tokens": "tokens"}, makes="checkpoint")
def extend_context(config: ExtendContextConfig, inputs: Inputs, ctx: Context) -> dict:
    """Lengthen a base model's context in phases, each starting from the weights of the one before."""
    base, tokens = inputs["checkpoint"].path, str(inputs["tokens"].path)
    models = config.models(load_config(base))
    folders = [*(ctx.scratch / f"phase-{number}" for number in range(len(config.phases) - 1)), ctx.out]
    bins = tuple(pairwise([0, load_config(base).max_position, *(model.max_position for model in models)]))
    measure = PositionLoss(str(base), tokens, models[-1].max_position, 3 * config.validation_windows, bins)
    before = spmd(loss_by_position, measure, ctx, workers=1)[0]

    results: list[TrainResult] = []
    for phase, model, folder in zip(config.phases, models, folders, strict=True):
        job = TrainJob(
            model=model,
            optimization=config,
            data=TokenWindows(tokens, phase.sequence_length),
            steps=phase.steps,
            batch_size=phase.batch_size,
            validation=Validation(tokens, phase.sequence_length, config.validation_windows, every=phase.steps),
            initial=str(folders[len(results) - 1]) if results else str(base),
            out=str(folder),
            scratch=str(ctx.scratch / f"resume-{len(results)}"),
            tokenizer=tokens,
            steps_before=sum(result.progress.step for result in results),
            steps_in_all=sum(phase.steps for phase in config.phases),
        )
        results.append(launch(job, ctx))

    after = spmd(loss_by_position, replace(measure, checkpoint=str(ctx.out)), ctx, workers=1)[0]
    names = [f"{start}-{end}" for start, end in bins]
    plot_bins(ctx.out / "loss_by_position.png", names, {"before": before, "after": after})
    plot_losses(ctx.out / "loss.png", results[-1])
    summary = summarize(job, results[-1])
    summary["steps"] = sum(result.progress.step for result in results)
    summary["tokens"] = sum(result.progress.tokens for result in results)
    summary["train_flops"] = sum(result.flops for result in results)
    seconds = sum(result.progress.seconds for result in results)
    summary["train_seconds"] = round(seconds, 1)
    summary["tokens_per_second"] = round(summary["tokens"] / seconds, 1)
    summary["skipped_steps"] = sum(result.progress.skipped for result in results)
    summary |= {f"loss_before_{name}": loss for name, loss in zip(names, before, strict=True)}
    return summary | {f"loss_after_{name}": loss for name, loss in zip(names, after, strict=True)}
