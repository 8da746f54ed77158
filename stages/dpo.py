"""Direct preference optimisation (2305.18290), as DeepSeek LLM ends its alignment (2401.02954, section 4).

A checkpoint learns to prefer the chosen reply over the rejected one, measured against itself as it was. The reference's
log-probabilities are computed once, before the first step; chosen and rejected replies are read behind one prompt.
"""

from __future__ import annotations

from infra.config import Field
from infra.errors import InputError
from infra.stage import Context, Inputs, stage
from stages.rl.pairs import encode_pairs
from stages.rl.preference_tasks import Dpo
from stages.rl.preferences import hold_out, read_preferences
from stages.tokens.bpe import load_tokenizer
from stages.training.checkpoint import load_config
from stages.training.examples import ExamplesConfig, ExamplesJob, launch_examples, summarize_examples


class DpoConfig(ExamplesConfig):
    beta: float = Field(0.1, title="β", description="How dear it is to leave the reference.", gt=0)
    label_smoothing: float = Field(
        0.0, title="Label smoothing", description="Share of pairs believed to be the wrong way round.", ge=0, lt=0.5
    )
    likelihood_weight: float = Field(
        0.0, title="Likelihood weight", description="Of the chosen reply's −log π a token; iterative RPO: 1.", ge=0
    )


@stage(version=1, takes={"checkpoint": "checkpoint", "preferences": "preferences"}, makes="checkpoint")
def dpo(config: DpoConfig, inputs: Inputs, ctx: Context) -> dict:
    """Teach a checkpoint to prefer the chosen replies of pairs to the rejected ones."""
    checkpoint, preferences = inputs["checkpoint"].path, read_preferences(inputs["preferences"].path)
    tokenizer = load_tokenizer(checkpoint)
    train, heldout = (
        encode_pairs(part, tokenizer, config.max_tokens)
        for part in hold_out(preferences, config.heldout_share, config.seed)
    )
    if not train:
        raise InputError(
            f"none of {len(preferences)} pairs is left to learn from: raise max_tokens or lower heldout_share"
        )
    job = ExamplesJob(
        task=Dpo(str(checkpoint), tokenizer.pad, config.beta, config.label_smoothing, config.likelihood_weight),
        config=config,
        model=load_config(checkpoint),
        train=train,
        heldout={"heldout": heldout},
        out=str(ctx.out),
        scratch=str(ctx.scratch),
    )
    return summarize_examples(job, launch_examples(job, ctx)) | {"pairs": len(preferences)}
