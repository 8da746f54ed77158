"""The training loop of one rank: plain torch.distributed, no orchestration.

    each step:  micro-batches → losses → gradients in one bucket → one all-reduce → clip → AdamW → routing biases

`train(job, report)` is what `infra.ray.spmd`, `torchrun` or a test calls. A job that was killed at any step, called
again with the same scratch folder, continues to the same weights, bit for bit on CPU: data is a function of the step,
randomness starts anew in each, and the state of resume.py has the rest. World size changes float rounding alone.

Legend: B rows, T positions, L mixture layers (MTP's last), E routed experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from random import Random
from typing import Any

import torch
from torch import Tensor

from infra.errors import ConfigError, FathomError
from infra.metrics import Report
from model.checkpointing import Recompute
from model.float8 import refresh, use_float8
from model.graphs import Replayed
from model.optimizer import build_optimizer
from model.router import update_routing_bias
from model.transformer import Transformer
from stages.training import schedules
from stages.training.checkpoint import load_weights, save_model
from stages.training.data import Batch
from stages.training.distributed import GradientBucket, Ranks, clip_factor, process_group
from stages.training.ema import WeightAverage
from stages.training.health import RoutingHealth, bias_drift, max_violation
from stages.training.job import Progress, TrainJob, TrainResult
from stages.training.losses import cross_entropy_sum, target_mask, total_loss
from stages.training.resume import ResumeStore
from stages.training.validation import bits_per_byte, validation_sets


class TrainingDiverged(FathomError):
    """Loss or gradients stopped being finite numbers."""

    exit_code = 3


def train(job: TrainJob, report: Report) -> TrainResult:
    """Train to `job.steps`, from the state in `job.scratch` if there is one; rank 0 leaves the checkpoint `job.out`."""
    with process_group() as ranks:
        return Trainer(job, ranks).finish(report)


class Trainer:
    """Model, optimiser and data of one rank, and the step that moves them."""

    def __init__(self, job: TrainJob, ranks: Ranks) -> None:
        self.job, self.ranks, options = job, ranks, job.optimization
        if job.unit % ranks.world:
            raise ConfigError(f"batches of {job.unit} sequences do not divide over {ranks.world} ranks")
        torch.manual_seed(options.seed)
        self.model = Transformer(job.model).to(ranks.device)
        if job.initial is not None:
            load_weights(self.model, job.initial)
        if options.precision == "fp8":
            use_float8(self.model)
        self.recompute = Recompute(options.recompute)
        self.recompute.attach(self.model)
        self.parameters = dict(self.model.named_parameters())
        self.average = WeightAverage(self.parameters, options.ema_decay) if options.ema_decay else None
        self.optimizer = build_optimizer(
            self.model,
            options.learning_rate.peak,
            options.weight_decay,
            (options.beta1, options.beta2),
            moment_dtype=torch.bfloat16 if options.moments == "bf16" else torch.float32,
            split=() if options.precision == "fp32" else self.model.low_precision_weights(),
        )
        rows = job.unit // ranks.world
        micro_rows = max(size for size in range(1, options.micro_batch_size + 1) if rows % size == 0)
        self.micro_batch = micro_rows * ranks.world
        self.batch_sizes = schedules.batch_sizes(job.steps, job.batch_size, job.batch_ramp)
        self.total_tokens = sum(self.batch_sizes) * job.data.sequence_length
        self.batches = job.data.open(self.micro_batch, options.seed, ranks.rank, ranks.world)
        self.sets = validation_sets(job.validation) if job.validation else []
        self.load_shape = (job.model.n_moe_layers, job.model.n_routed_experts)
        self.bucket = GradientBucket(
            list(self.model.parameters()),
            n_statistics=4 + math.prod(self.load_shape),
            # How many micro-batches a lesson's own replies fill is not known before.
            sums=ranks.world > 1 or max(self.batch_sizes) > self.micro_batch or job.lesson is not None,
        )
        graphs = options.cuda_graphs and ranks.device.type == "cuda"
        self.replayed = Replayed(self._backward) if graphs else None
        self.health = RoutingHealth(job.model, options, job.steps, ranks.device)
        self.progress = Progress()
        self.store = ResumeStore(job.scratch, job.retention)
        if (state := self.store.load()) is not None:
            self._restore(state)

    def finish(self, report: Report) -> TrainResult:
        """Run to the end; rank 0 leaves the checkpoint."""
        job, ranks = self.job, self.ranks
        self.run(report)
        self.optimizer.join()
        if ranks.rank == 0:
            with self.final_weights():
                save_model(job.out, self.model, job.tokenizer)
        ranks.barrier()
        flops = job.model.flops_per_token(job.data.sequence_length, mtp=True) * self.progress.tokens
        return TrainResult(self.progress, float(flops), ranks.world, self.health.history(self.progress.step))

    def run(self, report: Report) -> None:
        """All remaining steps, with validation before the first, every so often, and after the last."""
        with self.store:
            self._run(report)

    def _run(self, report: Report) -> None:
        job, progress = self.job, self.progress
        if progress.step == 0 and self.sets:
            self._record(report, {"step": 0, **self._validate()})
        since_seconds, since_tokens = progress.seconds, progress.tokens
        while progress.step < job.steps:
            started = time.monotonic()
            row = self.step()
            progress.seconds += time.monotonic() - started
            last = progress.step == job.steps
            if last or progress.step % job.report_every == 0:
                row["tokens_per_second"] = (progress.tokens - since_tokens) / (progress.seconds - since_seconds)
                since_seconds, since_tokens = progress.seconds, progress.tokens
                if self.sets and (last or progress.step % job.validation.every == 0):
                    row |= self._validate()
                self._record(report, row)
            if last or progress.step % job.save_every == 0:
                self.store.save(progress.step, self._state())

    def step(self) -> dict[str, Any]:
        """One optimiser step; its row of metrics."""
        options, progress, bucket = self.job.optimization, self.progress, self.bucket
        share = progress.tokens / self.total_tokens
        rate = options.learning_rate.at(progress.step, share)
        mtp_lambda = options.mtp_weight if share < schedules.V3_CONSTANT_UNTIL else options.mtp_weight_final
        torch.manual_seed(Random(f"{options.seed}/{progress.step}/{self.ranks.rank}").getrandbits(63))
        sequences = self.batch_sizes[progress.step]
        batches = self._read(sequences)
        counts_D = self._target_counts(batches, sequences)
        share_and_lambda = self._sent([len(batches[0].tokens_BT) / sequences, mtp_lambda])
        bucket.zero()
        # Targets under a loss mask are gathered, and how many they are is in no graph.
        replayed = self.replayed if batches[0].loss_mask_BT is None else None
        if replayed:
            refresh(self.model)
        for batch in batches:
            bucket.take((replayed or self._backward)(*batch, counts_D, share_and_lambda))
        bucket.reduce(self.ranks)
        loads_LE = bucket.statistics[4:].view(self.load_shape)
        figures = torch.cat([bucket.statistics[:4], self._routing_figures(loads_LE)])
        # The device is waited for here alone: what follows is queued behind the step.
        norm = bucket.norm()
        main, mtp, balance, dropped, *routing = figures.tolist()
        if math.isfinite(norm) and math.isfinite(main):
            self._update(rate, norm, loads_LE if share < schedules.V3_BIAS_UNTIL else None)
            self.health.update(progress.step + 1, loads_LE, self.model, dropped)
        else:
            self._skip(main, norm, rate)
        progress.step += 1
        progress.tokens += sequences * self.job.data.sequence_length
        row = {"step": progress.step, "loss": main, "learning_rate": rate, "gradient_norm": norm}
        row["tokens"] = progress.tokens
        if self.job.model.n_mtp:
            row["mtp_loss"] = mtp
        if routing:
            violation, drift, routed = routing
            row |= {"balance_loss": balance, "max_violation": violation, "bias_drift": drift}
            if self.job.model.capacity_factor is not None:
                row["drop_rate"] = dropped / routed
        return row

    def _routing_figures(self, loads_LE: Tensor) -> Tensor:
        """MaxVio, the drift of the biases that the step chose by, and the rows routed; empty for a dense model."""
        if not loads_LE.numel():
            return loads_LE.flatten()
        drift_L = bias_drift(self.model)
        return torch.stack([max_violation(loads_LE).mean(), drift_L.max(), loads_LE.sum()])

    def _read(self, sequences: int) -> list[Batch]:
        """This rank's rows of the step, by micro-batch. Sequences are numbered through the run, so that a resume with
        another world or micro-batch reads on where the last one stopped."""
        done = self.progress.tokens // self.job.data.sequence_length
        numbers = range(done // self.micro_batch, (done + sequences) // self.micro_batch)
        return [self.batches.batch(number).to(self.ranks.device) for number in numbers]

    def _target_counts(self, batches: list[Batch], sequences: int) -> Tensor:
        """Targets of the whole step, of all ranks, at each depth (0 is next-token), fp32: what loss sums are divided
        by."""
        depths = range(1 + self.job.model.n_mtp)
        if target_mask(batches[0].loss_mask_BT, batches[0].document_BT) is None:
            return self._sent([float(sequences * (self.job.data.sequence_length - depth)) for depth in depths])
        counts_D = torch.zeros(len(depths), device=self.ranks.device)
        for batch in batches:
            for depth in depths:
                counts_D[depth] += target_mask(batch.loss_mask_BT, batch.document_BT, depth).sum()
        return self.ranks.all_reduce(counts_D).clamp(min=1)

    def _sent(self, figures: list[float]) -> Tensor:
        """On the device, without waiting for it."""
        host = torch.tensor(figures)
        device = self.ranks.device
        return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)

    def _backward(
        self,
        tokens_BT: Tensor,
        loss_mask_BT: Tensor | None,
        document_BT: Tensor | None,
        positions_BT: Tensor | None,
        counts_D: Tensor,
        share_and_lambda: Tensor,
    ) -> list[Tensor]:
        """Add a micro-batch's part of the step's mean losses, of their gradients and of the loads to the bucket; the
        gradients that stay out of it are returned."""
        share, mtp_lambda = share_and_lambda
        with self.recompute.tape():
            out = self.model(
                tokens_BT[:, :-1],
                positions_BT=None if positions_BT is None else positions_BT[:, :-1],
                document_BT=None if document_BT is None else document_BT[:, :-1],
            )
        batch = Batch(tokens_BT, loss_mask_BT, document_BT, positions_BT)
        losses = [
            self.loss_sum(depth, hidden_BTD, batch) / counts_D[depth]
            for depth, hidden_BTD in enumerate([out.hidden_BTD, *out.mtp_hidden])
        ]
        balance = out.balance_loss(self.job.optimization.balance) * share
        total_loss(losses[0], losses[1:], balance, mtp_lambda).backward()
        mtp = torch.stack(losses[1:]).mean() if len(losses) > 1 else torch.zeros_like(balance)
        self.bucket.statistics[:3] += torch.stack([losses[0], mtp, balance]).detach()
        if out.load_LE is not None:
            self.bucket.statistics[4:] += out.load_LE.flatten()
        if out.dropped_L is not None:
            self.bucket.statistics[3] += out.dropped_L.sum()
        return self.bucket.collect()

    def loss_sum(self, depth: int, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        """Σ over the targets that `depth` predicts of their losses."""
        mask_BT = target_mask(batch.loss_mask_BT, batch.document_BT, depth)
        return cross_entropy_sum(hidden_BTD, self.model.head_weight, batch.tokens_BT[:, depth + 1 :], mask_BT)

    def _update(self, rate: float, norm: float, loads_LE: Tensor | None) -> None:
        """AdamW at `rate` on clipped gradients, then the routing biases by the step's loads (None: they are frozen)."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.average:
            self.average.before_change()
        self.optimizer.step(clip_factor(norm, self.job.optimization.gradient_clip))
        if self.average:
            self.average.follow(self.optimizer.master(weight) for weight in self.parameters.values())
        gamma = self.job.optimization.bias_update_speed
        if gamma and loads_LE is not None and loads_LE.numel():
            update_routing_bias(self.model, loads_LE, gamma)
        self.progress.skipped_in_row = 0

    def _skip(self, loss: float, norm: float, rate: float) -> None:
        """Refuse a step whose loss or gradients are not finite; call the run off after a few in a row."""
        most = self.job.optimization.max_skipped_steps
        self.progress.skipped += 1
        self.progress.skipped_in_row += 1
        if self.progress.skipped_in_row >= most:
            raise TrainingDiverged(
                f"step {self.progress.step + 1}: loss {loss}, gradient norm {norm}, {most} steps in a row at "
                f"learning rate {rate:.3g}; lower learning_rate.peak or gradient_clip, or lengthen the warm-up"
            )

    def _validate(self) -> dict[str, float]:
        """Bits per byte by language, of the weights and of their average."""
        self.model.eval()  # nothing is dropped where the model is measured
        row = self._bits_per_byte("bits_per_byte")
        if self.average:
            with self.average.lent(self.parameters):
                row |= self._bits_per_byte("ema_bits_per_byte")
        self.model.train()
        return row

    def _bits_per_byte(self, name: str) -> dict[str, float]:
        found = bits_per_byte(self.model, self.sets, self.ranks, self.micro_batch // self.ranks.world)
        return {f"{name}_{language}": value for language, value in found.items()}

    @contextmanager
    def final_weights(self) -> Iterator[None]:
        """The model holds inside what its checkpoint should."""
        if self.average and self.job.optimization.checkpoint_weights == "ema":
            with self.average.lent(self.parameters):
                yield
        else:
            yield

    def _record(self, report: Report, row: dict[str, Any]) -> None:
        """Keep a row and report its scalars."""
        self.progress.rows.append(row)
        done, total = self.job.steps_before + row["step"], self.job.steps_in_all or self.job.steps
        scalars = {name: value for name, value in row.items() if name != "step"}
        report(done, total, "steps", **scalars)

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "health": self.health.state_dict(),
            "progress": asdict(self.progress),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.health.load_state_dict(state["health"])
        self.progress = Progress(**state["progress"])
