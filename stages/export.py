"""Export: a checkpoint in the published format of its family, checked against transformers before it is committed.

Weights go from file to file in the dtype that they have, or by choice in DeepSeek-V3's released form, fp8 with a scale
for each 128 × 128. The folder loads in transformers, vLLM and SGLang. The check feeds the same real tokens to our model
and to the exported one as transformers builds it, both in fp32; a difference beyond fp32 rounding fails the stage. In
fp8 both get the weights that the codes stand for, read back from the files.
"""

from __future__ import annotations

import torch

from infra.config import Config, Field
from infra.errors import InputError
from infra.stage import Context, Inputs, stage
from model.exchange import export_hf, import_hf, write_published
from model.exchange.shards import MAX_SHARD_BYTES, Shards
from stages.tokens.bpe import load_tokenizer
from stages.training.checkpoint import load_config, load_model

SAMPLE = (
    "Everything that a stage leaves behind is an artifact, and every artifact knows what it was made of. "
    "每个阶段的输出都是一个有版本的产物。 def add(a: int, b: int) -> int:\n    return a + b"
)


UNPACKED = "unpacked"  # folder of the weights that an export in fp8 stands for


class ExportConfig(Config):
    max_shard_bytes: int = Field(MAX_SHARD_BYTES, title="Largest file", description="Bytes of weights a file.", ge=1)
    fp8: bool = Field(False, title="FP8", description="Weights of linear layers and experts in V3's fp8 blocks.")
    tolerance: float = Field(
        1e-3, title="Tolerance", description="Largest difference of a logit, relative to the largest logit.", gt=0
    )


@stage(version=3, takes={"checkpoint": "checkpoint"}, makes="export")
def export(config: ExportConfig, inputs: Inputs, ctx: Context) -> dict:
    """Write a checkpoint in the published format and compare its logits with transformers'."""
    source = inputs["checkpoint"].path
    model, weights = load_config(source), Shards(source)
    write_published(model, weights.specs, weights.read, ctx.out, source, config.max_shard_bytes, config.fp8)
    tokens_BT = torch.tensor([load_tokenizer(source).encode(SAMPLE)[: model.max_position]])
    summary = {}
    with torch.no_grad():
        ours_BTV = load_model(source)(tokens_BT).logits_BTV  # one model at a time
        if config.fp8:
            exact_BTV, ours_BTV = ours_BTV, _read_back(ctx, tokens_BT)
            apart = (ours_BTV - exact_BTV).norm() / exact_BTV.norm()
            summary["logits_moved_by_fp8"] = float(apart)
            theirs_BTV = _published_logits(str(ctx.scratch / UNPACKED), tokens_BT)
        else:
            theirs_BTV = _published_logits(str(ctx.out), tokens_BT)
    difference = float((ours_BTV - theirs_BTV).abs().max())
    if not difference <= config.tolerance * float(ours_BTV.abs().max()):
        raise InputError(
            f"transformers computes other logits from the export than we do (up to {difference:.3g} apart): "
            "nothing was committed"
        )
    return {
        "family": model.family,
        "parameters": model.n_parameters(),
        "max_logits_difference": difference,
        "compared_tokens": tokens_BT.shape[1],
        "greedy_agreement": float((ours_BTV.argmax(-1) == theirs_BTV.argmax(-1)).float().mean()),
        **summary,
    }


def _read_back(ctx: Context, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Our logits with the weights that the export's codes stand for, which are left in the scratch folder as fp32: to
    read fp8 itself, transformers wants packages and a GPU."""
    model = import_hf(ctx.out).float().eval()
    export_hf(model, ctx.scratch / UNPACKED)
    return model(tokens_BT).logits_BTV


def _published_logits(directory: str, tokens_BT: torch.Tensor) -> torch.Tensor:
    """The exported model's logits by transformers, fp32, from the folder alone."""
    from transformers import AutoModelForCausalLM

    published = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    return published(tokens_BT).logits.float()
