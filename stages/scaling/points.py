"""One run of a ladder: what it is, how it is trained, and the row that it leaves.

A finished point is a file of its own, written by whichever worker trained it; a killed one leaves the trainer's resume
states. A stage that starts again therefore trains what is missing and goes on inside what was under way.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from infra.artifact import digest
from infra.errors import ConfigError
from model.config import ModelConfig
from stages.training.data import TokenWindows
from stages.training.job import Optimization, TrainJob, TrainResult
from stages.training.trainer import TrainingDiverged, train
from stages.training.validation import Validation, validation_sets

Part = Literal["hyper", "ladder", "held_out"]
MIN_STEPS = 20  # a whole number of steps then misses the compute by 2.5 % at most


@dataclass(frozen=True)
class Point:
    """A model of M FLOPs per token, trained with C/M tokens at one learning rate and batch size."""

    part: Part
    compute: float  # C
    model: ModelConfig
    peak: float
    batch_size: int  # sequences
    steps: int
    seed: int

    @property
    def key(self) -> str:
        """Names the point's files inside the scratch folder of one artifact."""
        return digest({**asdict(self), "model": self.model.model_dump()})[:16]

    def flops(self, sequence_length: int) -> int:
        """Training FLOPs, embedding's head included: what the point costs."""
        return self.steps * self.batch_size * sequence_length * self.model.flops_per_token(sequence_length)


def plan_point(
    part: Part,
    compute: float,
    model: ModelConfig,
    peak: float,
    batch_size: int,
    sequence_length: int,
    seed: int,
) -> Point:
    """The point that spends `compute` on `model`, to the nearest whole step; ConfigError where those are too few."""
    scale = model.non_embedding_flops_per_token(sequence_length)
    steps = round(compute / (scale * batch_size * sequence_length))
    if steps < MIN_STEPS:
        raise ConfigError(
            f"compute {compute:.3g} at M = {scale:.3g} is {steps} steps of {batch_size} × {sequence_length} tokens; "
            f"{MIN_STEPS} are needed: lower that scale, batch_size or sequence_length, or raise the compute"
        )
    return Point(part, compute, model, peak, batch_size, steps, seed)


def round_batch(tokens: float, sequence_length: int) -> int:
    """The number of sequences nearest to `tokens` that is 2^k or 3·2^k, so that ranks and micro-batches divide it."""
    sizes = [factor << k for factor in (1, 3) for k in range(24)]
    return min(sizes, key=lambda size: abs(math.log(size * sequence_length / tokens)))


@dataclass(frozen=True)
class PointJob:
    """A point, the ordinary training job that makes it, and where its row goes."""

    point: Point
    train: TrainJob
    row: Path


def make_job(
    point: Point, options: Optimization, tokens: str, sequence_length: int, windows: int, folder: Path
) -> PointJob:
    """The job of `point` with the optimisation of `options`, whose files lie under `folder`; validated at its end."""
    rate = options.learning_rate.replace(peak=point.peak)
    return PointJob(
        point,
        TrainJob(
            model=point.model,
            optimization=options.replace(learning_rate=rate, seed=point.seed),
            data=TokenWindows(tokens, sequence_length),
            steps=point.steps,
            batch_size=point.batch_size,
            validation=Validation(tokens, sequence_length, windows, every=point.steps),
            out=str(folder / point.key / "out"),
            scratch=str(folder / point.key / "resume"),
            tokenizer=tokens,
            save_every=max(50, point.steps // 10),
            report_every=max(1, point.steps // 200),
        ),
        folder / f"{point.key}.json",
    )


def train_point(job: PointJob) -> dict[str, Any]:
    """Train a point, unless that was done, and return its row. A point of the hyper grid may diverge: loss None."""
    if (row := read_row(job)) is not None:
        return row
    try:
        result = train(job.train, lambda *args, **metrics: None)
    except TrainingDiverged:
        if job.point.part != "hyper":
            raise
        return write_row(job, None)
    return write_row(job, result)


def read_row(job: PointJob) -> dict[str, Any] | None:
    """The row of a finished point."""
    return json.loads(job.row.read_text(encoding="utf-8")) if job.row.is_file() else None


def write_row(job: PointJob, result: TrainResult | None) -> dict[str, Any]:
    """Publish the row of a point (None: it diverged) and drop its resume states."""
    point, length = job.point, job.train.data.sequence_length
    row: dict[str, Any] = {
        "part": point.part,
        "compute": point.compute,
        "scale": point.model.non_embedding_flops_per_token(length),
        "tokens": point.steps * point.batch_size * length,
        "bits_per_byte": None if result is None else _bits_per_byte(job.train.validation, result),
        "d_model": point.model.d_model,
        "n_layers": point.model.n_layers,
        "n_heads": point.model.n_heads,
        "parameters": point.model.n_parameters(),
        "peak": point.peak,
        "batch_tokens": point.batch_size * length,
        "steps": point.steps,
        "seed": point.seed,
        "train_loss": None if result is None else result.last("loss"),
        "train_flops": point.flops(length),
    }
    draft = job.row.with_suffix(".draft")
    draft.write_text(json.dumps(row), encoding="utf-8")
    draft.replace(job.row)
    shutil.rmtree(job.row.with_suffix(""), ignore_errors=True)
    return row


def _bits_per_byte(chosen: Validation, result: TrainResult) -> float:
    """Of all validation text together: each language by its bytes."""
    n_bytes = {found.language: found.n_bytes for found in validation_sets(chosen)}
    bits = sum(result.last(f"bits_per_byte_{language}") * n for language, n in n_bytes.items())
    return bits / sum(n_bytes.values())
