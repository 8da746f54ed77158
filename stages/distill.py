"""Distillation: a small Llama- or Qwen-shaped student, ours or an imported one, learns from a reasoning teacher.

`sft` is DeepSeek-R1's (section 2.4): fine-tuning on the teacher's samples and nothing else. `logits` learns the
teacher's whole next-token distribution on them, `on_policy` the same on replies that the student samples itself
(GKD, Agarwal et al. 2023). Both need the teacher's checkpoint, and a student with its tokenizer.

The summary has what a comparison at equal compute needs: `train_flops` of the student, its own sampling included, and
`sample_flops` of the teacher: what it sampled the conversations with, and what it spent on reading them.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from infra.artifact import Artifact
from infra.config import Field
from infra.errors import InputError
from infra.stage import Context, Inputs, optional, stage
from stages.rl.distiller import require_same_tokenizer
from stages.training.checkpoint import load_config
from stages.training.job import Lesson
from stages.training.supervised import SupervisedConfig, fine_tune, read_conversations

STUDENT_FAMILIES = ("llama", "qwen2", "qwen3")
BETA = {"logits": 0.0, "on_policy": 1.0}


class DistillConfig(SupervisedConfig):
    """As sft's; the paper gives 800K samples two epochs."""

    method: Literal["sft", "logits", "on_policy"] = Field(
        "sft", title="Method", description="Learn the samples, the teacher's distribution on them, or on own replies"
    )
    beta: float | None = Field(
        None,
        ge=0,
        le=1,
        title="Divergence β",
        description="0: forward KL, 1: reverse KL, between: Jensen-Shannon; none: 0 for logits, 1 on policy",
    )
    temperature: float = Field(1.0, gt=0, title="Temperature", description="Of both distributions; not for sft")
    budget: Literal["student", "with_teacher"] | None = Field(
        None,
        title="Budget",
        description="Instead of epochs or steps: as many FLOPs as the input `rival` was trained with, spent by the "
        "student alone or with the teacher's sampling counted",
    )
    max_new_tokens: int = Field(64, ge=1, title="Longest own reply", description="On policy alone")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if sum(length is not None for length in (self.epochs, self.steps, self.budget)) != 1:
            raise ValueError("give one of epochs, steps and budget")
        if self.budget and self.method != "sft":
            raise ValueError("budget counts the cost of method=sft: give epochs or steps for another")
        return self

    @model_validator(mode="after")
    def _the_samples_have_no_distribution(self) -> Self:
        if self.method == "sft" and (self.beta is not None or self.temperature != 1):
            raise ValueError("method=sft learns samples and has no divergence: leave beta and temperature out")
        return self


@stage(
    version=1,
    takes={
        "student": "checkpoint",
        "conversations": "conversations",
        "teacher": optional("checkpoint"),
        "rival": optional("checkpoint"),
    },
    makes="checkpoint",
)
def distill(config: DistillConfig, inputs: Inputs, ctx: Context) -> dict:
    """Train a pre-trained student on the conversations of a teacher, or on the teacher's opinion of them."""
    student, conversations = inputs["student"], inputs["conversations"]
    family = load_config(student.path).family
    if family not in STUDENT_FAMILIES:
        raise InputError(
            f"{student.id} is of family {family!r}, a student is one of {', '.join(STUDENT_FAMILIES)}: "
            "pretrain one with model.family set, or import one"
        )
    lesson = _lesson(config, student, inputs.get("teacher"))
    paid = _paid(config, inputs)
    summary = fine_tune(paid, student, read_conversations(conversations.path), ctx, lesson)
    # On policy the conversations lend their questions alone: what their replies cost was not for this student.
    sampled = 0.0 if config.method == "on_policy" else conversations.summary.get("sample_flops", 0.0)
    sampled += summary.pop("teacher_flops", 0.0)
    return summary | {"method": config.method, "family": family, "sample_flops": sampled}


def _paid(config: DistillConfig, inputs: Inputs) -> DistillConfig:
    """The config with the steps that its budget pays for. InputError where it pays for none, or has no rival."""
    rival = inputs.get("rival")
    if (rival is None) == (config.budget is not None):
        raise InputError("rival: give the checkpoint whose compute is to be equalled together with budget, or neither")
    if rival is None:
        return config
    flops = rival.summary.get("train_flops", 0.0)
    if config.budget == "with_teacher":
        flops -= inputs["conversations"].summary.get("sample_flops", 0.0)
    model = load_config(inputs["student"].path)
    step = model.flops_per_token(config.sequence_length, mtp=True) * config.sequence_length * config.batch_size
    if flops < step:
        raise InputError(
            f"budget: {rival.id} leaves {flops:.2g} FLOPs and a step takes {step:.2g}: sample less from the teacher, "
            "or train the rival for longer"
        )
    return config.model_copy(update={"steps": int(flops // step), "budget": None})


def _lesson(config: DistillConfig, student: Artifact, teacher: Artifact | None) -> Lesson | None:
    """What the teacher teaches; None for its samples. InputError if it is missing, needless, or of other tokens."""
    if config.method == "sft":
        if teacher is not None:
            raise InputError(
                f"method=sft reads no teacher: leave {teacher.id} out, or set method to logits or on_policy"
            )
        return None
    if teacher is None:
        raise InputError(f"method={config.method} asks the teacher itself: give its checkpoint as the input teacher")
    require_same_tokenizer(str(student.path), str(teacher.path))
    beta = BETA[config.method] if config.beta is None else config.beta
    on_policy = config.method == "on_policy"
    return Lesson(str(teacher.path), on_policy, beta, config.temperature, config.max_new_tokens)
