"""Fine-tuning on conversations: what `sft` and `distill` share.

Conversations are rendered by the chat template, packed several to a row, and learnt from only where the assistant
speaks. Attention, positions and targets stay inside each conversation, so packing changes speed and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import model_validator

from infra.artifact import Artifact, Scalar
from infra.config import Field
from infra.errors import InputError
from infra.stage import Context
from stages.tokens.bpe import load_tokenizer
from stages.tokens.chat_template import render
from stages.tokens.tools import Tools
from stages.training.checkpoint import load_config
from stages.training.data import PackedRows, write_packed
from stages.training.job import Lesson, Optimization, TrainJob
from stages.training.launch import launch, summarize
from stages.training.plots import plot_losses
from stages.training.schedules import LearningRate

Messages = Sequence[dict[str, Any]]
# Rows of a conversations artifact: `messages` and `tools` as JSON; `problem` is None where no problem was asked,
# `tools` where none was offered.
CONVERSATIONS = pa.schema(
    [(name, pa.string()) for name in ("id", "messages", "problem", "language", "family", "tools")]
)


class Conversation(NamedTuple):
    """What a chat template renders."""

    messages: Messages
    tools: Tools = ()


class SupervisedConfig(Optimization):
    """Give `epochs` or `steps`. V3 and R1 fine-tune for two epochs with a cosine schedule."""

    epochs: float | None = Field(None, title="Epochs", description="Passes over the conversations.", gt=0)
    steps: int | None = Field(None, title="Steps", description="Instead of epochs.", ge=1)
    batch_size: int = Field(16, title="Batch size", description="Packed rows a step, over all workers.", ge=1)
    sequence_length: int = Field(512, title="Row length", description="Longer conversations are left out.", ge=8)
    learning_rate: LearningRate = Field(
        LearningRate(schedule="cosine", peak=1e-3, warmup_steps=5), title="Learning rate"
    )
    mtp_weight: float = Field(0.1, title="MTP weight λ", ge=0)
    bias_update_speed: float = Field(
        0.0, title="Bias update speed γ", description="Padding is routed too: keep it 0, as V3 ends.", ge=0
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self


def conversation_rows(directory: Path) -> list[dict[str, Any]]:
    """Every row of a conversations artifact, as `CONVERSATIONS` has it. InputError if there is none."""
    paths = sorted(directory.glob("conversations-*.parquet"))
    if not paths:
        raise InputError(f"{directory} holds no conversations-*.parquet: give a conversations artifact")
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def read_conversations(directory: Path) -> list[Conversation]:
    """The conversations of an artifact. InputError if there is none."""
    rows = conversation_rows(directory)
    return [Conversation(json.loads(row["messages"]), json.loads(row.get("tools") or "[]")) for row in rows]


def fine_tune(
    config: SupervisedConfig,
    base: Artifact,
    conversations: Iterable[Conversation],
    ctx: Context,
    lesson: Lesson | None = None,
) -> dict[str, Scalar]:
    """Train the checkpoint `base` on `conversations`, or on what a teacher says of them; the summary.

    Raises InputError when none fits a row.
    """
    tokenizer = load_tokenizer(base.path)
    model = load_config(base.path)
    rendered = [render(messages, tokenizer, tools=tools) for messages, tools in conversations]
    examples = [(ids, mask) for ids, mask in rendered if len(ids) <= config.sequence_length + 1 and any(mask)]
    if not examples:
        raise InputError(
            f"none of {len(rendered)} conversations has a reply and fits {config.sequence_length} tokens: "
            "raise sequence_length or check the conversations"
        )
    packed = ctx.scratch / "packed.npz"
    n_rows = write_packed(packed, examples, config.sequence_length, tokenizer.pad)
    steps = config.steps or max(1, round((config.epochs or 0) * n_rows / config.batch_size))
    longest = config.sequence_length + (lesson.max_new_tokens if lesson and lesson.on_policy else 0)
    job = TrainJob(
        model=model.replace(max_position=max(model.max_position, longest)),
        optimization=config,
        data=PackedRows(str(packed), config.sequence_length),
        steps=steps,
        batch_size=config.batch_size,
        initial=str(base.path),
        out=str(ctx.out),
        scratch=str(ctx.scratch / "resume"),
        tokenizer=str(base.path),
        lesson=lesson,
    )
    result = launch(job, ctx)
    plot_losses(ctx.out / "loss.png", result)
    return summarize(job, result) | {
        "conversations": len(examples),
        "conversations_left_out": len(rendered) - len(examples),
        "packed_rows": n_rows,
        "row_fill": round(sum(len(ids) for ids, _ in examples) / (n_rows * (config.sequence_length + 1)), 4),
        "learnt_tokens": sum(sum(mask) for _, mask in examples),
        "epochs": round(steps * config.batch_size / n_rows, 3),
        "loss_start": result.values("loss")[0][1],
        **({"teacher_flops": sum(value for _, value in result.values("teacher_flops"))} if lesson else {}),
    }
