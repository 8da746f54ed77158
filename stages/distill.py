"""Distillation: a small Llama- or Qwen-shaped student learns a reasoning teacher's samples (DeepSeek-R1, section 2.4).

Supervised fine-tuning and nothing else, as in the paper. The summary has what a comparison with reinforcement learning
at equal compute needs: `train_flops`, and `sample_flops` that the teacher spent on the conversations.
"""

from __future__ import annotations

from infra.errors import InputError
from infra.stage import Context, Inputs, stage
from stages.training.checkpoint import load_config
from stages.training.supervised import SupervisedConfig, fine_tune, read_conversations

STUDENT_FAMILIES = ("llama", "qwen2", "qwen3")


class DistillConfig(SupervisedConfig):
    """As sft's; the paper gives 800K samples two epochs."""


@stage(version=1, takes={"student": "checkpoint", "conversations": "conversations"}, makes="checkpoint")
def distill(config: DistillConfig, inputs: Inputs, ctx: Context) -> dict:
    """Fine-tune a pre-trained student on the conversations of a teacher."""
    student = inputs["student"]
    family = load_config(student.path).family
    if family not in STUDENT_FAMILIES:
        raise InputError(
            f"{student.id} is of family {family!r}, a student is one of {', '.join(STUDENT_FAMILIES)}: "
            "pretrain one with model.family set"
        )
    conversations = inputs["conversations"]
    summary = fine_tune(config, student, read_conversations(conversations.path), ctx)
    return summary | {"family": family, "sample_flops": conversations.summary.get("sample_flops", 0.0)}
