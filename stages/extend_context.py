"""Context extension by YaRN (2309.00071) in phases of growing length, as DeepSeek-V2 and V3 do (V3, section 4.3).

Each phase scales the rotary frequencies by its `rope_factor` over the *pre-training* length and trains shortly on
longer windows at the rate where pre-training ended. V3: 1000 steps at 32K, then 1000 at 128K, s = 40, α = 1, β = 32,
attention factor 0.1·ln s + 1. Its windows hold whole documents, long ones where there are any, and a share of them may
have lookups planted in it: what a small model has to be shown before it looks for a needle in a haystack. The report
holds loss by length and the needle map, before and after.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from itertools import pairwise

from infra.config import Config, Field
from infra.errors import ConfigError
from infra.ray import spmd
from infra.stage import Context, Inputs, stage
from model.config import ModelConfig
from stages.evaluation.context import ContextJob, ContextMeasure, compare, gather, headline, measure_context
from stages.evaluation.needle import NeedleGrid
from stages.tokens.loader import PackedLoader
from stages.tokens.packing import LongDocuments
from stages.training.checkpoint import load_config
from stages.training.data import TokenWindows
from stages.training.job import Optimization, TrainJob, TrainResult
from stages.training.launch import launch, summarize
from stages.training.plots import plot_loss_by_length, plot_losses, plot_needles
from stages.training.schedules import LearningRate
from stages.training.validation import Validation


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
    documents: LongDocuments | None = Field(
        LongDocuments(), title="Whole documents", description="None: end to end, cut where a window ends."
    )
    mask_documents: bool = Field(False, title="Mask documents", description="Attend inside documents only.")
    lookups: float = Field(
        0.0, title="Lookups", description="Share of windows with facts planted that they ask for later.", ge=0, le=1
    )
    learning_rate: LearningRate = Field(LearningRate(schedule="constant", peak=3e-4), title="Learning rate")
    mtp_weight: float = Field(0.1, title="MTP weight λ", description="V3's at the end of pre-training.", ge=0)
    bias_update_speed: float = Field(0.0, title="Bias update speed γ", description="V3 ends with 0.", ge=0)
    micro_batch_size: int = Field(4, title="Micro-batch", description="Most rows of one forward pass of a rank.", ge=1)
    validation_windows: int = Field(8, title="Validation windows", description="Per language.", ge=1)
    needle: NeedleGrid | None = Field(NeedleGrid(), title="Needles", description="None: no needle map.")

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


@stage(version=3, takes={"checkpoint": "checkpoint", "tokens": "tokens"}, makes="checkpoint")
def extend_context(config: ExtendContextConfig, inputs: Inputs, ctx: Context) -> dict:
    """Lengthen a base model's context in phases, each starting from the weights of the one before."""
    base, tokens = inputs["checkpoint"].path, str(inputs["tokens"].path)
    before, models = load_config(base), config.models(load_config(base))
    folders = [*(ctx.scratch / f"phase-{number}" for number in range(len(config.phases) - 1)), ctx.out]
    measure = ContextJob(
        checkpoint=str(base),
        tokens=tokens,
        edges=(0, before.max_position, *(model.max_position for model in models)),
        windows=3 * config.validation_windows,
        needle=config.needle,
        needle_lengths=config.needle.resolve(before.max_position, models[-1].max_position) if config.needle else (),
        tokens_at_once=config.micro_batch_size * models[-1].max_position,
        precision=config.precision,
        seed=config.seed,
    )
    measured_before = _measured_once(measure, ctx)

    results: list[TrainResult] = []
    for phase, model, folder in zip(config.phases, models, folders, strict=True):
        job = TrainJob(
            model=model,
            optimization=config,
            data=TokenWindows(tokens, phase.sequence_length, config.mask_documents, config.documents, config.lookups),
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

    steps = sum(result.progress.step for result in results)
    measured_after = gather(spmd(measure_context, replace(measure, checkpoint=str(ctx.out), done_before=steps), ctx))
    report = compare(measure, measured_before, measured_after)
    report["windows"] = [_windows(tokens, phase, config) for phase in config.phases]
    (ctx.out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    plot_loss_by_length(ctx.out / "loss_by_length.png", report)
    plot_needles(ctx.out / "needle.png", report)
    plot_losses(ctx.out / "loss.png", results[-1])
    summary = headline(report) | summarize(job, results[-1])
    summary["steps"] = steps
    summary["tokens"] = sum(result.progress.tokens for result in results)
    summary["train_flops"] = sum(result.flops for result in results)
    seconds = sum(result.progress.seconds for result in results)
    summary["train_seconds"] = round(seconds, 1)
    summary["tokens_per_second"] = round(summary["tokens"] / seconds, 1)
    summary["skipped_steps"] = sum(result.progress.skipped for result in results)
    return summary


def _measured_once(job: ContextJob, ctx: Context) -> ContextMeasure:
    """The measure of the base, kept in scratch: a resumed stage goes on with its phases."""
    kept = ctx.scratch / "before.pickle"
    if not kept.exists():
        draft = kept.with_suffix(".draft")
        draft.write_bytes(pickle.dumps(gather(spmd(measure_context, job, ctx))))
        draft.replace(kept)
    return pickle.loads(kept.read_bytes())


def _windows(tokens: str, phase: Phase, config: ExtendContextConfig) -> dict[str, int | float]:
    """What a phase read: how many windows there were, how many of them long, and how often it went round."""
    loader = PackedLoader(
        tokens, "train", phase.sequence_length, phase.batch_size, config.seed, documents=config.documents
    )
    return {
        "sequence_length": phase.sequence_length,
        "windows": loader.n_windows,
        "long_windows": loader.n_long,
        "long_share_read": loader.long_rate,
        "epochs_of_long": phase.steps * phase.batch_size * loader.long_rate / max(loader.n_long, 1),
    }
