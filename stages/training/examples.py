"""Training on examples that have a loss each: what `dpo` and the reward models share. Plain torch.distributed.

    each step:  this rank's examples → micro-batches → one bucket of gradients and figures → one all-reduce → AdamW

A `Task` says what an example is and what its loss is. Which examples a step learns from is a function of (seed, step),
so the weights, the optimiser and what was computed once before the start are the whole state of a killed run.

Legend: E examples, K constants of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from infra.artifact import Scalar
from infra.config import Config, Field
from infra.metrics import Report
from infra.ray import spmd
from infra.stage import Context
from model.config import ModelConfig
from model.optimizer import build_optimizer
from stages.evaluation.intervals import wilson
from stages.evaluation.plots import Panel, plot_curves
from stages.training.distributed import GradientBucket, Ranks, clip_factor, process_group
from stages.training.resume import ResumeStore
from stages.training.schedules import LearningRate
from stages.training.trainer import TrainingDiverged


class ExamplesConfig(Config):
    """What the config of every such stage begins with; defaults are sized for two CPU cores."""

    epochs: float = Field(1.0, title="Epochs", description="Passes over what is learnt from.", gt=0)
    batch_size: int = Field(32, title="Batch size", description="Examples a step, over all workers.", ge=1)
    learning_rate: LearningRate = Field(
        LearningRate(schedule="cosine", peak=1e-4, warmup_steps=5), title="Learning rate"
    )
    weight_decay: float = Field(0.0, title="Weight decay", description="Decoupled; matrices only.", ge=0)
    gradient_clip: float = Field(1.0, title="Gradient clip", description="Largest L2 norm of all gradients.", gt=0)
    heldout_share: float = Field(0.1, title="Held-out share", description="Of the prompts; 0: none.", ge=0, lt=1)
    evaluate_every: int = Field(
        50, title="Evaluate every", description="Steps between measures of the held-out examples.", ge=1
    )
    max_tokens: int = Field(1024, title="Longest example", description="Longer ones are left out.", ge=8)
    micro_batch_tokens: int = Field(8192, title="Tokens a micro-batch", description="Padded; bounds the memory.", ge=1)
    save_every: int = Field(50, title="Save every", description="Steps between resume points.", ge=1)
    seed: int = Field(0, title="Seed", description="Order of the examples, and which are held out.")


class Task(Protocol):
    """What is learnt; picklable. `figures` name what `loss` adds up besides; "accuracy" must be among them."""

    figures: tuple[str, ...]
    n_constants: int  # K: what the weights at the start say of an example, and the loss needs
    head: bool  # whether the module has one over the vocabulary

    def open(self, device: torch.device) -> Any:
        """The module to train, in eval mode: nothing of it is random."""
        ...

    def constants(self, model: Any, examples: Sequence[Any]) -> Tensor:
        """[E, K], computed once, before the first step."""
        ...

    def loss(self, model: Any, examples: Sequence[Any], constants_EK: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(Σ of the examples' losses / count, Σ of each figure over the examples [len(figures)])."""
        ...

    def save(self, model: Any, directory: str) -> None: ...


@dataclass(frozen=True)
class ExamplesJob:
    """All that a rank needs; picklable. `heldout` is measured by name and never learnt from."""

    task: Task
    config: ExamplesConfig
    model: ModelConfig
    train: Sequence[Any]
    heldout: dict[str, Sequence[Any]]
    out: str
    scratch: str

    @property
    def steps(self) -> int:
        return max(1, round(self.config.epochs * len(self.train) / self.config.batch_size))


def fit(job: ExamplesJob, report: Report) -> list[dict[str, float]]:
    """Train on this rank: a row of figures for each step, the same on all ranks. Rank 0 leaves the model in `out`."""
    with process_group() as ranks:
        return _Fitting(job, ranks).run(report)


class _Fitting:
    """State of one rank."""

    def __init__(self, job: ExamplesJob, ranks: Ranks) -> None:
        self.job, self.config, self.task, self.ranks = job, job.config, job.task, ranks
        self.model: nn.Module = job.task.open(ranks.device)
        self.optimizer = build_optimizer(self.model, self.config.learning_rate.peak, self.config.weight_decay)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.bucket = GradientBucket(trained, n_statistics=1 + len(job.task.figures))
        self.store = ResumeStore(Path(job.scratch) / "resume")
        self.rows: list[dict[str, float]] = []  # one for each step that is done
        state = self.store.load()
        if state is None:
            self.constants = {name: self._constants(examples) for name, examples in self._sets().items()}
        else:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.constants, self.rows = state["constants"], state["rows"]
        ranks.barrier()  # all have read before rank 0 may write

    def run(self, report: Report) -> list[dict[str, float]]:
        steps = self.job.steps
        with self.store:
            while (number := len(self.rows)) < steps:
                before = self._measure() if number == 0 else {}
                row = {**{f"{name}_start": value for name, value in before.items()}, **self._step(number)}
                done = number + 1
                if done == steps or done % self.config.evaluate_every == 0:
                    row |= self._measure()
                self.rows.append(row)
                if done % self.config.save_every == 0:
                    self.store.save(done, self._state())
                report(done, steps, "steps", **row)
        if self.ranks.rank == 0:
            self.task.save(self.model, self.job.out)
        self.ranks.barrier()
        return self.rows

    def _sets(self) -> dict[str, Sequence[Any]]:
        return {"train": self.job.train, **self.job.heldout}

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "constants": self.constants,
            "rows": self.rows,
        }

    def _step(self, number: int) -> dict[str, float]:
        """One optimiser step; its row is the mean of the figures over the step's examples."""
        config, job = self.config, self.job
        rate = config.learning_rate.at(number, number / job.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.bucket.zero()
        mine = self._numbers(number)[self.ranks.rank :: self.ranks.world]
        for numbers in micro_batches(job.train, mine, config.micro_batch_tokens):
            loss, figures = self._loss("train", numbers, config.batch_size)
            loss.backward()
            self.bucket.statistics[0] += loss.detach()
            self.bucket.statistics[1:] += figures
        self.bucket.reduce(self.ranks)
        loss_sum, *figure_sums = self.bucket.statistics.tolist()
        norm = self.bucket.norm()
        if not math.isfinite(norm):
            raise TrainingDiverged(
                f"step {number + 1}: loss {loss_sum}, gradient norm {norm}; lower learning_rate.peak or gradient_clip"
            )
        self.optimizer.step(clip_factor(norm, config.gradient_clip))
        means = {name: total / config.batch_size for name, total in zip(self.task.figures, figure_sums, strict=True)}
        return {"loss": loss_sum, **means, "learning_rate": rate, "gradient_norm": norm}

    def _numbers(self, step: int) -> list[int]:
        """The examples of a step: all of them in a new order each epoch, without repeats in between."""
        size, found = len(self.job.train), []
        for position in range(step * self.config.batch_size, (step + 1) * self.config.batch_size):
            epoch, place = divmod(position, size)
            if getattr(self, "_epoch", None) != epoch:
                self._epoch, self._order = epoch, list(range(size))
                Random(f"{self.config.seed}/{epoch}").shuffle(self._order)
            found.append(self._order[place])
        return found

    def _loss(self, name: str, numbers: list[int], count: int) -> tuple[Tensor, Tensor]:
        examples = [self._sets()[name][number] for number in numbers]
        return self.task.loss(self.model, examples, self.constants[name][numbers].to(self.ranks.device), count)

    @torch.no_grad()
    def _constants(self, examples: Sequence[Any]) -> Tensor:
        """[E, K] of all ranks' examples, each computed by one of them."""
        found_EK = torch.zeros(len(examples), self.task.n_constants, device=self.ranks.device)
        for numbers in self._shares(examples):
            found_EK[numbers] = self.task.constants(self.model, [examples[number] for number in numbers])
        return self.ranks.all_reduce(found_EK).cpu()

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Mean loss and figures of the held-out examples."""
        row = {}
        for name, examples in self.job.heldout.items():
            sums = torch.zeros(1 + len(self.task.figures), device=self.ranks.device)
            for numbers in self._shares(examples):
                loss, figures = self._loss(name, numbers, 1)
                sums += torch.cat([loss[None], figures])
            means = (self.ranks.all_reduce(sums) / max(len(examples), 1)).tolist()
            if examples:
                row |= {f"{name}_{what}": mean for what, mean in zip(("loss", *self.task.figures), means, strict=True)}
        return row

    def _shares(self, examples: Sequence[Any]) -> list[list[int]]:
        """This rank's micro-batches of all examples, by number."""
        mine = list(range(self.ranks.rank, len(examples), self.ranks.world))
        return micro_batches(examples, mine, self.config.micro_batch_tokens)


def micro_batches(examples: Sequence[Any], numbers: list[int], max_tokens: int) -> list[list[int]]:
    """Numbers of examples of about one length, at most `max_tokens` padded tokens together, or one longer example."""
    left = sorted(numbers, key=lambda number: len(examples[number]), reverse=True)
    made = []
    while left:
        taken = max(1, max_tokens // len(examples[left[0]]))
        made.append(left[:taken])
        left = left[taken:]
    return made


def launch_examples(job: ExamplesJob, ctx: Context) -> list[dict[str, float]]:
    """Run `job` on the context's workers, and draw its curves."""
    rows = spmd(fit, job, ctx, workers=min(ctx.workers, job.config.batch_size))[0]
    rows = [{"step": step, **row} for step, row in enumerate(rows, start=1)]
    sets = ("", *(f"{name}_" for name in job.heldout))
    panels = [Panel(what.capitalize(), tuple(f"{s}{what}" for s in sets)) for what in ("loss", *job.task.figures)]
    plot_curves(ctx.out / "curves.png", rows, panels)
    return rows


def summarize_examples(job: ExamplesJob, rows: list[dict[str, float]]) -> dict[str, Scalar]:
    """Sizes, cost, figures of the first and the last tenth of the steps, and held-out ones with Wilson's interval."""
    learnt = sum(map(len, job.train)) * len(rows) * job.config.batch_size / len(job.train)
    once = sum(len(example) for examples in (job.train, *job.heldout.values()) for example in examples)
    mean = max(1, round(learnt / (len(rows) * job.config.batch_size)))
    passes = learnt + (once / 3 if job.task.n_constants else 0)
    per_token = job.model.flops_per_token if job.task.head else job.model.non_embedding_flops_per_token
    summary: dict[str, Scalar] = {
        "steps": len(rows),
        "examples": len(job.train),
        "tokens": round(learnt),
        "train_flops": passes * per_token(mean),
    }
    tenth = max(1, len(rows) // 10)
    for what in ("loss", *job.task.figures):
        summary[f"{what}_first"] = round(sum(row[what] for row in rows[:tenth]) / tenth, 4)
        summary[f"{what}_last"] = round(sum(row[what] for row in rows[-tenth:]) / tenth, 4)
    for name, examples in job.heldout.items():
        summary[f"{name}_examples"] = len(examples)
        if examples:
            for what in ("loss", *job.task.figures):
                summary[f"{name}_{what}"] = round(rows[-1][f"{name}_{what}"], 4)
            summary[f"{name}_accuracy_start"] = round(rows[0][f"{name}_accuracy_start"], 4)
            interval = wilson(round(rows[-1][f"{name}_accuracy"] * len(examples)), len(examples))
            summary |= {
                f"{name}_accuracy_low": round(interval.low, 4),
                f"{name}_accuracy_high": round(interval.high, 4),
            }
    return summary
