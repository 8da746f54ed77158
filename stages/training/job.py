"""What a training stage asks for and what it gets back: config fields, the picklable job, the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import model_validator

from infra.config import Config, Field
from model.balance import BalanceWeights
from model.checkpointing import Recomputed
from model.config import ModelConfig
from stages.training.data import Data
from stages.training.resume import Retention
from stages.training.schedules import BatchRamp, LearningRate
from stages.training.validation import Validation


class Optimization(Config):
    """What every training stage's config begins with. Defaults are V3's (section 4.2) where they do not scale."""

    learning_rate: LearningRate = Field(title="Learning rate")
    weight_decay: float = Field(0.1, title="Weight decay", description="Decoupled; matrices only.", ge=0)
    beta1: float = Field(0.9, title="AdamW β₁", ge=0, lt=1)
    beta2: float = Field(0.95, title="AdamW β₂", ge=0, lt=1)
    gradient_clip: float = Field(1.0, title="Gradient clip", description="Largest L2 norm of all gradients.", gt=0)
    mtp_weight: float = Field(0.3, title="MTP weight λ", description="Until 10T of V3's 14.8T tokens.", ge=0)
    mtp_weight_final: float = Field(0.1, title="Final MTP weight λ", description="From there on.", ge=0)
    balance_alpha: float = Field(
        1e-4, title="Balance α", description="Of the sequence-wise (V3) or expert-level loss (MoE, V2: α₁).", ge=0
    )
    device_balance_alpha: float = Field(
        0.0, title="Device balance α₂", description="Between groups of experts; V2: 0.05.", ge=0
    )
    communication_balance_alpha: float = Field(
        0.0, title="Communication balance α₃", description="Of what a group receives; V2: 0.02.", ge=0
    )
    bias_update_speed: float = Field(1e-3, title="Bias update speed γ", description="0 after 14.3T of 14.8T.", ge=0)
    health_window: int = Field(200, title="Routing window", description="Steps over which routing is judged.", ge=1)
    max_dead_share: float | None = Field(
        0.5,
        title="Most dead experts",
        description="Share of a layer's without a token in a window. None: off.",
        gt=0,
        le=1,
    )
    max_violation: float | None = Field(
        0.9,
        title="Largest MaxVio",
        description="Over a window, as a share of its worst, E/K - 1. None: off.",
        gt=0,
        le=1,
    )
    precision: Literal["fp32", "bf16", "fp8"] = Field(
        "fp32",
        title="Precision",
        description="Of activations and products. fp8: V3's, bf16 but for the products of linear layers and experts. "
        "bf16 weights keep fp32 masters.",
    )
    moments: Literal["fp32", "bf16"] = Field("fp32", title="Moments", description="Of AdamW; V3 keeps them in bf16.")
    recompute: tuple[Recomputed, ...] = Field(
        (),
        title="Recompute",
        description="What the backward pass makes again: memory for time. rms_norm, mla_up, swiglu (V3), or block.",
    )
    cuda_graphs: bool = Field(
        True,
        title="CUDA graphs",
        description="Record a micro-batch's passes once and replay them: the same numbers, sooner. Not for losses on "
        "a part of the tokens.",
    )
    ema_decay: float | None = Field(
        None, title="EMA decay", description="Of the average of the weights that is validated beside them.", gt=0, lt=1
    )
    checkpoint_weights: Literal["last", "ema"] = Field(
        "last", title="Weights of the checkpoint", description="As trained, or their average."
    )
    max_skipped_steps: int = Field(
        3, title="Most skipped steps", description="Non-finite steps in a row that end the run.", ge=1
    )
    micro_batch_size: int = Field(16, title="Micro-batch", description="Most rows of one forward pass of a rank.", ge=1)
    seed: int = Field(0, title="Seed", description="Initial weights and data order.", ge=0)

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.checkpoint_weights == "ema" and self.ema_decay is None:
            raise ValueError("checkpoint_weights='ema' needs an average: set ema_decay")
        if "block" in self.recompute and len(self.recompute) > 1:
            raise ValueError("recompute='block' makes everything of a block again: leave the other names out")
        return self

    @property
    def balance(self) -> BalanceWeights:
        return BalanceWeights(self.balance_alpha, self.device_balance_alpha, self.communication_balance_alpha)


@dataclass(frozen=True)
class Lesson:
    """A teacher whose next-token distribution a student learns, in place of the text (stages/rl/distiller.py)."""

    teacher: str  # checkpoint with the student's tokenizer
    on_policy: bool  # on replies of the student's own, in place of the conversations'
    beta: float  # 0: forward KL, 1: reverse KL, between: the generalised Jensen-Shannon divergence
    temperature: float  # of both distributions
    max_new_tokens: int  # of a reply of its own


@dataclass(frozen=True)
class TrainJob:
    """All that a rank needs; picklable. Paths, `save_every` and `retention` are context: they change no result."""

    model: ModelConfig
    optimization: Optimization
    data: Data
    steps: int
    batch_size: int  # sequences a step, over all ranks
    out: str  # where rank 0 leaves the trained checkpoint
    scratch: str  # where resume states live
    tokenizer: str | None = None  # folder whose tokenizer goes into `out`
    initial: str | None = None  # checkpoint to start from; None starts from random weights
    batch_ramp: BatchRamp | None = None
    validation: Validation | None = None
    save_every: int = 50
    retention: Retention = field(default_factory=Retention)
    report_every: int = 1
    steps_before: int = 0  # reported steps of earlier phases of the same stage
    steps_in_all: int = 0  # of all phases; 0 means this job's
    lesson: Lesson | None = None

    @property
    def unit(self) -> int:
        """Sequences that every step's batch is a multiple of: what must divide over the ranks."""
        return self.batch_ramp.start if self.batch_ramp else self.batch_size


@dataclass
class Progress:
    """What has been counted so far; saved with the weights, so that a resumed run's report is whole."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent training, over all processes that worked on the job
    skipped: int = 0
    skipped_in_row: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)  # one per reported step


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns on every rank."""

    progress: Progress
    flops: float
    world: int
    health: dict[str, Any] | None = None  # RoutingHealth.history

    @property
    def tokens_per_second(self) -> float:
        return self.progress.tokens / self.progress.seconds

    @property
    def languages(self) -> list[str]:
        """Languages that were validated on."""
        names = {name for row in self.progress.rows for name in row if name.startswith("bits_per_byte_")}
        return sorted(name.removeprefix("bits_per_byte_") for name in names)

    def values(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every row that has `name`."""
        return [(row["step"], row[name]) for row in self.progress.rows if name in row]

    def last(self, name: str) -> float | None:
        values = self.values(name)
        return values[-1][1] if values else None
