"""Scaling laws, V1's way (DeepSeek LLM, 2401.02954, section 3), and a held-out run that puts them to the test.

    hyper grid     peak rate × batch at some budgets      → η_opt(C), B_opt(C)
    ladder         several scales M at each budget C      → M_opt(C), D_opt(C), loss(C)
    held out       one run beyond the ladder, at the predicted M, η and B: predicted against measured loss

The loss is bits per byte of the validation text. Every run is the ordinary trainer's: points run side by side on Ray,
the held-out one on all workers. Finished points stay in the stage's scratch, and one that was under way leaves its
resume states there: a stage that was killed goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby, product
from typing import Any, Self

import numpy as np
from pydantic import model_validator

from infra.config import Config, Field
from infra.errors import ConfigError, InputError
from infra.ray import ray_map
from infra.stage import Context, Inputs, stage
from model.config import ModelConfig
from stages.scaling.hyper import Grid, batch_law, fit_hyper, rate_law
from stages.scaling.isoflop import IsoFlop, fit_laws
from stages.scaling.laws import PowerLaw
from stages.scaling.parametric import fit_parametric
from stages.scaling.plots import plot_grids, plot_held_out, plot_isoflop, plot_optima
from stages.scaling.points import (
    Part,
    Point,
    PointJob,
    make_job,
    plan_point,
    read_row,
    round_batch,
    train_point,
    write_row,
)
from stages.scaling.report import Findings, content, markdown, summarize
from stages.scaling.shapes import shape_for
from stages.tokens.bpe import load_tokenizer
from stages.tokens.shards import TokenShards
from stages.training.job import Optimization
from stages.training.launch import launch

Row = dict[str, Any]


class Budget(Config):
    compute: float = Field(title="Compute C", description="Non-embedding FLOPs of each run", gt=0)
    scales: tuple[float, ...] = Field(title="Scales M", description="Non-embedding FLOPs per token", min_length=4)


class GridBudget(Config):
    compute: float = Field(title="Compute C", description="Non-embedding FLOPs of each run", gt=0)
    scale: float = Field(title="Scale M", description="Non-embedding FLOPs per token", gt=0)


class HyperGrid(Config):
    budgets: tuple[GridBudget, ...] = Field(title="Budgets", min_length=2)
    peak_factors: tuple[float, ...] = Field((0.5, 1.0, 2.0), title="Peak factors", description="× learning_rate.peak")
    batch_factors: tuple[float, ...] = Field((0.5, 1.0, 2.0), title="Batch factors", description="× batch_size")


class ScalingLawsConfig(Optimization):
    model: ModelConfig = Field(
        title="Base shape",
        description="A scale's model has its proportion of depth to width. vocab_size comes from the tokenizer.",
    )
    sequence_length: int = Field(256, title="Sequence length", ge=2)
    batch_size: int = Field(32, title="Batch size", description="Sequences a step; the centre of a grid.", ge=1)
    budgets: tuple[Budget, ...] = Field(title="Ladder", description="IsoFLOP budgets, least first.", min_length=3)
    repeats: int = Field(1, title="Repeats", description="Seeds of each point of the ladder.", ge=1)
    hyper: HyperGrid | None = Field(None, title="Hyper-parameter grid", description="None: peak and batch as given.")
    held_out: float = Field(title="Held-out compute", description="Beyond the largest budget.", gt=0)
    validation_windows: int = Field(12, title="Validation windows", description="Per language.", ge=1)

    @model_validator(mode="after")
    def _climbs(self) -> Self:
        computes = [budget.compute for budget in self.budgets]
        if computes != sorted(set(computes)) or self.held_out <= computes[-1]:
            raise ValueError(f"budgets must grow, and held_out ({self.held_out:g}) lie beyond the last: {computes}")
        if self.hyper and len({budget.compute for budget in self.hyper.budgets}) < len(self.hyper.budgets):
            raise ValueError("hyper.budgets need a compute each: give every grid another one")
        return self


@stage(version=2, takes={"tokens": "tokens"}, makes="report")
def scaling_laws(config: ScalingLawsConfig, inputs: Inputs, ctx: Context) -> dict:
    """Train a ladder of small models, fit the scaling laws, and predict a held-out larger run."""
    runs = _Runs(config, str(inputs["tokens"].path), ctx)
    grids = runs.grids()
    if grids:
        peak, batch = rate_law(grids), batch_law(grids)
    else:
        peak, batch = PowerLaw(config.learning_rate.peak, 0), PowerLaw(config.batch_size * config.sequence_length, 0)
    ladder = runs.ladder(peak, batch)
    laws = fit_laws(ladder, config.seed)
    held_out = runs.held_out(laws.scale, peak, batch)
    found = Findings(
        ladder=ladder,
        laws=laws,
        grids=grids,
        hyper=fit_hyper(grids, laws.noise, config.seed) if grids else None,
        parametric=fit_parametric(ladder),
        held_out=held_out,
        rows=tuple(runs.rows),
        most_epochs=max(row["tokens"] for row in runs.rows) / TokenShards(runs.tokens, "train").n_tokens,
    )
    plot_isoflop(ctx.out / "isoflop.png", ladder, laws)
    plot_optima(ctx.out / "optima.png", laws, config.held_out)
    plot_held_out(ctx.out / "held_out.png", ladder, laws, config.held_out, held_out["bits_per_byte"])
    if grids:
        plot_grids(ctx.out / "hyper.png", grids)
    (ctx.out / "points.jsonl").write_text("".join(json.dumps(row) + "\n" for row in runs.rows), encoding="utf-8")
    (ctx.out / "report.json").write_text(json.dumps(content(found), ensure_ascii=False, indent=1), encoding="utf-8")
    (ctx.out / "report.md").write_text(markdown(found), encoding="utf-8")
    return summarize(found)


class _Runs:
    """Plans and trains the points of all parts. Progress counts their training FLOPs, for points differ in cost."""

    def __init__(self, config: ScalingLawsConfig, tokens: str, ctx: Context) -> None:
        self.config, self.tokens, self.ctx = config, tokens, ctx
        self.length, self.workers = config.sequence_length, ctx.workers
        self.folder = ctx.scratch / "points"
        self.folder.mkdir(exist_ok=True)
        vocab_size = load_tokenizer(tokens).vocab_size
        self.base = config.model.replace(vocab_size=vocab_size, max_position=config.sequence_length)
        self.shapes = {budget.compute: self._shapes(budget) for budget in config.budgets}
        self.rows: list[Row] = []
        largest = self.shapes[config.budgets[-1].compute][-1]
        # Parts to come are counted as if every step were whole and the held-out run had the ladder's largest shape.
        self.flops: dict[Part, float] = {
            "hyper": sum(point.flops(self.length) for point in self._grid_points()),
            "ladder": config.repeats * sum(self._flops(c, shape) for c, each in self.shapes.items() for shape in each),
            "held_out": self._flops(config.held_out, largest),
        }

    def grids(self) -> tuple[Grid, ...]:
        """The runs of the hyper-parameter grid; none where the config has no grid."""
        rows = _by_compute(self._train(self._grid_points()))
        grids = tuple(Grid(c, *(_column(of, x) for x in ("peak", "batch_tokens", "bits_per_byte"))) for c, of in rows)
        for grid in grids:
            if not np.isfinite(grid.losses_G).any():
                raise InputError(
                    f"every setting of the grid at C = {grid.compute:.3g} diverged: lower learning_rate.peak"
                )
        return grids

    def ladder(self, peak: PowerLaw, batch: PowerLaw) -> tuple[IsoFlop, ...]:
        """The IsoFLOP runs, each at the rate and batch that the laws give for its compute."""
        points = [
            self._point("ladder", compute, shape, peak.at(compute), batch.at(compute), repeat)
            for compute, shapes in self.shapes.items()
            for shape in shapes
            for repeat in range(self.config.repeats)
        ]
        rows = self._train(points)
        return tuple(
            IsoFlop(compute, _column(of, "scale"), _column(of, "bits_per_byte")) for compute, of in _by_compute(rows)
        )

    def held_out(self, scale: PowerLaw, peak: PowerLaw, batch: PowerLaw) -> Row:
        """The run beyond the ladder, at the scale, rate and batch that the laws predict for it."""
        compute = self.config.held_out
        point = self._point("held_out", compute, self._shape(scale.at(compute)), peak.at(compute), batch.at(compute))
        job = self._job(point)
        self.flops["held_out"] = point.flops(self.length)
        row = read_row(job) or write_row(job, launch(job.train, self))
        self._finished(row)
        return row

    def report(self, done: int, total: int, unit: str, **metrics: float) -> None:
        """The held-out run's reports, as its share of all FLOPs."""
        self._report(self._spent() + done / total * self.flops["held_out"], **metrics)

    def _train(self, points: Sequence[Point]) -> list[Row]:
        """Rows of the points, in their order; finished ones are not trained again."""
        before = len(self.rows)
        jobs = {point.key: self._job(point) for point in points}
        rows = {key: row for key, job in jobs.items() if (row := read_row(job)) is not None}
        self.rows += rows.values()
        # The longest first, so that the workers end together.
        waiting = sorted(set(jobs) - set(rows), key=lambda key: -jobs[key].point.flops(self.length))
        for key, row in zip(
            waiting, ray_map(train_point, [jobs[key] for key in waiting], share_gpus=True), strict=True
        ):
            rows[key] = row
            self._finished(row)
        self.rows[before:] = [rows[key] for key in jobs]
        return self.rows[before:]

    def _grid_points(self) -> list[Point]:
        config = self.config
        if config.hyper is None:
            return []
        return [
            self._point(
                "hyper",
                budget.compute,
                self._shape(budget.scale),
                config.learning_rate.peak * peak_factor,
                config.batch_size * self.length * batch_factor,
            )
            for budget in config.hyper.budgets
            for peak_factor, batch_factor in product(config.hyper.peak_factors, config.hyper.batch_factors)
        ]

    def _shapes(self, budget: Budget) -> list[ModelConfig]:
        """The shapes of a budget's scales, smallest first."""
        shapes = {shape.non_embedding_flops_per_token(self.length): shape for shape in map(self._shape, budget.scales)}
        if len(shapes) < len(budget.scales):
            raise ConfigError(
                f"budget {budget.compute:.3g}: {len(budget.scales)} scales give {len(shapes)} different shapes; spread "
                "them wider, or give a base of narrower heads"
            )
        return [shapes[scale] for scale in sorted(shapes)]

    def _shape(self, scale: float) -> ModelConfig:
        return shape_for(self.base, scale, self.length)

    def _point(
        self, part: Part, compute: float, shape: ModelConfig, peak: float, batch_tokens: float, repeat: int = 0
    ) -> Point:
        batch_size = round_batch(batch_tokens, self.length)
        return plan_point(part, compute, shape, peak, batch_size, self.length, self.config.seed + repeat)

    def _job(self, point: Point) -> PointJob:
        return make_job(point, self.config, self.tokens, self.length, self.config.validation_windows, self.folder)

    def _flops(self, compute: float, shape: ModelConfig) -> float:
        """All training FLOPs of a run of `compute`: the head's come on top."""
        return compute * shape.flops_per_token(self.length) / shape.non_embedding_flops_per_token(self.length)

    def _finished(self, row: Row) -> None:
        self.rows.append(row)
        loss = {} if row["bits_per_byte"] is None else {"bits_per_byte": row["bits_per_byte"]}
        self._report(self._spent(), points=len(self.rows), **loss, compute=row["compute"], scale=row["scale"])

    def _spent(self) -> float:
        return sum(row["train_flops"] for row in self.rows)

    def _report(self, flops: float, **metrics: float) -> None:
        total = max(flops, sum(self.flops.values()))
        self.ctx.report(round(flops / 1e9), round(total / 1e9), "GFLOPs", **metrics)


def _by_compute(rows: Iterable[Row]) -> list[tuple[float, list[Row]]]:
    """Rows of one compute after another, as they were planned."""
    return [(compute, list(of)) for compute, of in groupby(rows, key=lambda row: row["compute"])]


def _column(rows: Iterable[Row], name: str) -> np.ndarray:
    """One figure of all rows; that of a run that diverged is infinite."""
    return np.array([np.inf if row[name] is None else row[name] for row in rows])
