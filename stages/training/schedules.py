"""Learning-rate and batch-size schedules of the DeepSeek papers, as pure functions.

Every schedule is a linear warm-up counted in *steps*, times a shape over *progress*: the share of the run's tokens
consumed before this step, in [0, 1). Counting progress in tokens keeps a schedule's meaning under a batch ramp, and
lets the papers' breakpoints (80 % of tokens, 10T of 14.8T) be written as the papers write them.
"""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import model_validator

from infra.config import Config, Field
from infra.errors import ConfigError

# V3 (section 4.2) as shares of its 14.8T tokens. At the first, the rate starts to fall and λ of MTP goes from 0.3 to
# 0.1; at the second, the rate reaches its floor and routing biases freeze (γ = 0).
V3_CONSTANT_UNTIL = 10 / 14.8
V3_BIAS_UNTIL = 14.3 / 14.8


@dataclass(frozen=True)
class Segment:
    """One piece of a shape: from the previous piece's end `until` this progress, from `start` to `end` × the peak."""

    until: float
    start: float
    end: float
    curve: Literal["linear", "cosine"] = "linear"


def multi_step(first: float, second: float) -> tuple[Segment, ...]:
    """×0.316 at `first`, ×0.1 in all at `second` (V1: 0.8 and 0.9; V2: 0.6 and 0.9 of the tokens)."""
    return Segment(first, 1.0, 1.0), Segment(second, 0.316, 0.316), Segment(1.0, 0.1, 0.1)


def deepseek_v3() -> tuple[Segment, ...]:
    """2.2e-4 to 10T tokens, cosine to 2.2e-5 over 4.3T, 2.2e-5 for 333B, 7.3e-6 for 167B; 14.8T in all (V3, 4.2)."""
    tail, end = 2.2e-5 / 2.2e-4, 7.3e-6 / 2.2e-4
    return (
        Segment(V3_CONSTANT_UNTIL, 1.0, 1.0),
        Segment(V3_BIAS_UNTIL, 1.0, tail, "cosine"),
        Segment(14.633 / 14.8, tail, tail),
        Segment(1.0, end, end),
    )


def warmup_stable_decay(decay: float, final: float) -> tuple[Segment, ...]:
    """Constant, then linear to `final` × the peak over the last `decay` share of the tokens."""
    return Segment(1.0 - decay, 1.0, 1.0), Segment(1.0, 1.0, final)


class LearningRate(Config):
    """A learning rate over a run. `at(step, progress)` is the rate that step `step` (from 0) uses."""

    schedule: Literal["constant", "cosine", "multi_step_v1", "multi_step_v2", "v3", "wsd"] = Field(
        "v3", title="Schedule", description="Shape after the warm-up; v3 is constant, cosine, then two constant tails."
    )
    peak: float = Field(title="Peak rate", gt=0)
    warmup_steps: int = Field(0, title="Warm-up steps", description="Linear from 0; the papers use 2000.", ge=0)
    final: float = Field(0.1, title="Final share", description="Last rate / peak of cosine and wsd.", ge=0, le=1)
    decay: float = Field(0.2, title="Decay share", description="Share of tokens that wsd decays over.", gt=0, le=1)

    @model_validator(mode="after")
    def _only_what_the_schedule_uses(self) -> "LearningRate":
        used = {"cosine": {"final"}, "wsd": {"final", "decay"}}.get(self.schedule, set())
        for name in {"final", "decay"} - used:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no meaning for schedule {self.schedule!r}; leave it out")
        return self

    def segments(self) -> tuple[Segment, ...]:
        match self.schedule:
            case "constant":
                return (Segment(1.0, 1.0, 1.0),)
            case "cosine":
                return (Segment(1.0, 1.0, self.final, "cosine"),)
            case "multi_step_v1":
                return multi_step(0.8, 0.9)
            case "multi_step_v2":
                return multi_step(0.6, 0.9)
            case "v3":
                return deepseek_v3()
            case "wsd":
                return warmup_stable_decay(self.decay, self.final)

    def at(self, step: int, progress: float) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.peak * warmup * shape(self.segments(), progress)


def shape(segments: tuple[Segment, ...], progress: float) -> float:
    """The value of a piecewise shape at `progress`; a breakpoint belongs to the piece after it."""
    begin = 0.0
    for segment in segments:
        if progress < segment.until:
            share = (progress - begin) / (segment.until - begin)
            if segment.curve == "cosine":
                share = 0.5 * (1.0 - math.cos(math.pi * share))
            return segment.start + (segment.end - segment.start) * share
        begin = segment.until
    return segments[-1].end


class BatchRamp(Config):
    """A batch that grows in multiples of `start` sequences to the full batch over the first `until` share of the steps.

    V3 goes from 3072 to 15360 over the first 469B of 14.8T tokens; V2 from 2304 to 9216 over 225B of 8.1T.
    """

    start: int = Field(title="First batch", description="Sequences in the first step.", ge=1)
    until: float = Field(title="Ramp share", description="Share of the steps over which it grows.", gt=0, le=1)


def batch_sizes(steps: int, batch_size: int, ramp: BatchRamp | None) -> list[int]:
    """Sequences of each step; under a ramp all are multiples of its start, as V2's and V3's full batches are."""
    if ramp is None:
        return [batch_size] * steps
    if batch_size % ramp.start:
        raise ConfigError(f"batch_size={batch_size} is no multiple of batch_ramp.start={ramp.start}: change one")
    length = ramp.until * steps
    sizes = (ramp.start + (batch_size - ramp.start) * min(1.0, step / length) for step in range(steps))
    return [int(size) // ramp.start * ramp.start for size in sizes]
