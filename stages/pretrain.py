"""Pre-training: tokens to a base checkpoint, V3's way (section 4.2) at whatever size the config says.

The result depends on the config and the tokens alone. How many workers took part, and how often they were killed and
resumed, is context: it changes float rounding at most.
"""

from __future__ import annotations

import json

from infra.config import Field
from infra.stage import Context, Inputs, stage
from model.config import ModelConfig
from stages.tokens.bpe import load_tokenizer
from stages.training.data import TokenWindows
from stages.training.job import Optimization, TrainJob
from stages.training.launch import launch, summarize
from stages.training.plots import plot_losses, plot_routing_health
from stages.training.schedules import BatchRamp, LearningRate, batch_sizes
from stages.training.validation import Validation


class PretrainConfig(Optimization):
    model: ModelConfig = Field(
        title="Model", description="vocab_size comes from the tokenizer, max_position from sequence_length."
    )
    steps: int = Field(title="Steps", ge=1)
    batch_size: int = Field(32, title="Batch size", description="Sequences a step, over all workers.", ge=1)
    batch_ramp: BatchRamp | None = Field(None, title="Batch ramp", description="Grow the batch at the start (V2, V3).")
    sequence_length: int = Field(256, title="Sequence length", ge=2)
    mask_documents: bool = Field(False, title="Mask documents", description="Attend inside documents only.")
    learning_rate: LearningRate = Field(LearningRate(peak=3e-3, warmup_steps=20), title="Learning rate")
    validation_every: int = Field(50, title="Validate every", description="Steps.", ge=1)
    validation_windows: int = Field(12, title="Validation windows", description="Per language.", ge=1)

    def trained_model(self, vocab_size: int) -> ModelConfig:
        """The model that a tokenizer of `vocab_size` makes of `model`."""
        return self.model.replace(vocab_size=vocab_size, max_position=self.sequence_length)

    def n_tokens(self) -> int:
        """Tokens of the whole run."""
        return sum(batch_sizes(self.steps, self.batch_size, self.batch_ramp)) * self.sequence_length


@stage(version=3, takes={"tokens": "tokens"}, makes="checkpoint")
def pretrain(config: PretrainConfig, inputs: Inputs, ctx: Context) -> dict:
    """Train a language model from random weights on packed tokens."""
    tokens = str(inputs["tokens"].path)
    job = TrainJob(
        model=config.trained_model(load_tokenizer(tokens).vocab_size),
        optimization=config,
        data=TokenWindows(tokens, config.sequence_length, config.mask_documents),
        steps=config.steps,
        batch_size=config.batch_size,
        batch_ramp=config.batch_ramp,
        validation=Validation(tokens, config.sequence_length, config.validation_windows, config.validation_every),
        out=str(ctx.out),
        scratch=str(ctx.scratch / "resume"),
        tokenizer=tokens,
    )
    result = launch(job, ctx)
    plot_losses(ctx.out / "loss.png", result)
    if result.health is None:
        return summarize(job, result)
    (ctx.out / "routing_health.json").write_text(json.dumps(result.health), encoding="utf-8")
    plot_routing_health(ctx.out / "routing_health.png", result.health)
    last = result.health["rows"][-1]
    return summarize(job, result) | {
        "dead_experts": sum(len(dead) for dead in last["dead"]),
        "worst_layer_violation": max(last["global_violation"]),
        "drop_rate": last["drop_rate"],
    }
