"""GRPO's per-worker program: plain torch, so `torchrun` can start it where there is no Ray.

Every rank holds the model, an engine of its own and the frozen reference. A step: draw the step's questions, explore
this rank's share of them, turn the rewards of each group into advantages, add this share's gradient to the flat bucket,
all-reduce once, update. Every rank explores *and* learns, so that no kind of worker waits for the other.

What makes a killed run continue to the last bit: the questions and the seeds of step s are functions of (seed, s,
chunk), so the model, the optimiser and the reference are the whole state. A chunk is `rollout_groups` questions;
chunks, not ranks, own the seeds, so the replies do not depend on how many ranks share the work. Dynamic sampling asks
as many further questions as groups had no contrast, from those that the step has not asked, and so needs no state.

Legend: P questions, G replies to each, B replies of a micro-batch, R tokens of the longest.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from infra.metrics import Report
from model.optimizer import build_optimizer
from stages.problems.problem import Problem
from stages.rl.advantages import without_contrast
from stages.rl.algorithms import ALGORITHMS
from stages.rl.engines import open_engine
from stages.rl.engines.base import Sampling
from stages.rl.micro_batch import micro_batches, token_logprobs
from stages.rl.mismatch import mismatch, truncated_importance
from stages.rl.policy_loss import PolicyBatch, policy_loss
from stages.rl.rollout import Rollout, explore, forward_flops, write_rollouts
from stages.rl.tally import Tally
from stages.tokens.bpe import load_tokenizer
from stages.training.checkpoint import load_model, save_model
from stages.training.distributed import GradientBucket, Ranks, clip_factor, process_group
from stages.training.resume import ResumeStore
from stages.training.trainer import TrainingDiverged

if TYPE_CHECKING:
    from stages.grpo import GrpoConfig

ROLLOUTS = "rollouts"  # folder inside scratch


@dataclasses.dataclass(frozen=True)
class GrpoJob:
    config: GrpoConfig
    checkpoint: str
    problems: tuple[Problem, ...]
    out: str
    scratch: str


def learn(job: GrpoJob, report: Report) -> list[dict[str, float]]:
    """Run the whole job on this rank: a row of metrics for each step. Rank 0 leaves the checkpoint in `job.out`."""
    with process_group() as ranks:
        return Learner(job, ranks).run(report)


class Learner:
    """State of one rank. `step(number)` is one exploration and its updates."""

    def __init__(self, job: GrpoJob, ranks: Ranks) -> None:
        self.job, self.config, self.ranks = job, job.config, ranks
        self.tokenizer = load_tokenizer(job.checkpoint)
        self.model = load_model(job.checkpoint, str(ranks.device))
        # RL trains the main model: the multi-token-prediction modules wait aside, unchanged, and return at the end.
        self.whole = (self.model.mtp, self.model.config)
        self.model.mtp, self.model.config = torch.nn.ModuleList(), self.model.config.replace(n_mtp=0)
        split = self.model.low_precision_weights() if self.config.precision == "bf16" else ()
        self.optimizer = build_optimizer(self.model, self.config.learning_rate, self.config.weight_decay, split=split)
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if self.config.kl_coefficient else None
        self.bucket = GradientBucket([p for p in self.model.parameters() if p.requires_grad])
        self.engine = open_engine(self.config.engine, self.model, job.checkpoint)
        self.sampling = Sampling(
            self.config.max_new_tokens, temperature=self.config.temperature, stop_ids=(self.tokenizer.eos,)
        )
        self.store = ResumeStore(Path(job.scratch) / "resume")
        self.rows: list[dict[str, float]] = []  # one for each step that is done

    def run(self, report: Report) -> list[dict[str, float]]:
        self.restore()
        with self.store:
            while len(self.rows) < self.config.steps:
                self.rows.append(self.step(len(self.rows)))
                done = len(self.rows)
                if done % self.config.save_every == 0:
                    self.store.save(done, self.state())
                report(done, self.config.steps, "steps", **self.rows[-1])
        if self.ranks.rank == 0:
            self.optimizer.join()
            self.model.mtp, self.model.config = self.whole
            save_model(self.job.out, self.model, self.job.checkpoint)
        return self.rows

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "reference": self.reference.state_dict() if self.reference else None,
            "rows": self.rows,
        }

    def restore(self) -> None:
        """Take up the newest saved state, if there is one."""
        state = self.store.load()
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.reference:
                self.reference.load_state_dict(state["reference"])
            self.rows = state["rows"]
        self.ranks.barrier()  # all have read before rank 0 may write

    def step(self, number: int) -> dict[str, float]:
        """Explore, learn, measure. The row of metrics is the same on every rank."""
        config = self.config
        tally = Tally(config.languages)
        if self.reference and config.reference_renew_every and number and number % config.reference_renew_every == 0:
            self.reference.load_state_dict(self.model.state_dict())
        started = time.monotonic()
        rollouts = self.explore(number)
        explored = time.monotonic()
        rewards_PG = self.rewards_of(rollouts)
        flat_P = without_contrast(rewards_PG)
        advantages = ALGORITHMS[config.loss].advantages(rewards_PG).flatten().tolist()
        tally.explored(rollouts, groups=len(flat_P), flat_groups=int(flat_P.sum()))
        if config.keep_rollouts_every and (number % config.keep_rollouts_every == 0 or number == config.steps - 1):
            self.keep(number, rollouts, advantages)
        # Without an advantage (all of a group without contrast) a reply has no policy gradient, only its KL term:
        # leaving it out saves its forward and backward, and costs that pull towards the reference.
        batch = [(r, a) for r, a in zip(rollouts, advantages, strict=True) if a != 0]
        self.update(number, batch, self.normaliser(rollouts, flat_P), tally)
        tally.add(flops=self.step_flops(rollouts, [r for r, _ in batch]))
        row = tally.reduce(self.ranks)
        row["flops"] += self.rows[-1]["flops"] if self.rows else 0.0  # spent so far
        seconds = time.monotonic() - started
        return row | {
            "tokens_per_second": row["reply_tokens"] / seconds,
            "generation_share": (explored - started) / seconds,
        }

    def questions(self, number: int) -> list[list[Problem]]:
        """The chunks of questions of step `number`: the pool in a new order each epoch, without repeats in between."""
        config, pool = self.config, self.job.problems
        asked: list[Problem] = []
        for position in range(number * config.groups_per_step, (number + 1) * config.groups_per_step):
            epoch, index = divmod(position, len(pool))
            asked.append(pool[self.order(epoch)[index]])
        return [asked[i : i + config.rollout_groups] for i in range(0, len(asked), config.rollout_groups)]

    def order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._order = epoch, list(range(len(self.job.problems)))
            Random(f"{self.config.seed}/{epoch}").shuffle(self._order)
        return self._order

    def spare(self, number: int) -> list[Problem]:
        """The questions that step `number` has not asked, in an order of its own."""
        asked = {problem.id for chunk in self.questions(number) for problem in chunk}
        rest = [problem for problem in self.job.problems if problem.id not in asked]
        Random(f"{self.config.seed}/{number}/spare").shuffle(rest)
        return rest

    def explore(self, number: int) -> list[Rollout]:
        """This rank's share of the step's groups, and of those that replace groups without contrast."""
        config, chunks = self.config, self.questions(number)
        self.engine.update_weights(self.model.state_dict().items())
        rollouts = self.ask(number, 0, chunks)
        spare = self.spare(number) if config.dynamic_sampling else []
        first = len(chunks)
        for _ in range(config.dynamic_sampling):
            (useful,) = self.over_ranks(int((~without_contrast(self.rewards_of(rollouts))).sum()))
            missing = config.groups_per_step - int(useful)
            further, spare = spare[:missing], spare[missing:]
            if not further:
                break
            chunks = [further[i : i + config.rollout_groups] for i in range(0, len(further), config.rollout_groups)]
            rollouts += self.ask(number, first, chunks)
            first += len(chunks)
        return rollouts

    def ask(self, number: int, first: int, chunks: list[list[Problem]]) -> list[Rollout]:
        """This rank's share of `chunks`, which are numbered from `first` in step `number`."""
        config, rollouts = self.config, []
        for chunk, problems in enumerate(chunks, start=first):
            if chunk % self.ranks.world == self.ranks.rank:
                rollouts += explore(
                    self.engine,
                    self.tokenizer,
                    problems,
                    config.group_size,
                    config.template,
                    self.sampling,
                    Random(f"{config.seed}/{number}/{chunk}").getrandbits(62),
                    config.rewards,
                    config.target_language,
                )
        return rollouts

    def rewards_of(self, rollouts: list[Rollout]) -> torch.Tensor:
        """[P, G] fp64, of this rank's groups."""
        rewards = [rollout.score.reward for rollout in rollouts]
        return torch.tensor(rewards, dtype=torch.float64).view(-1, self.config.group_size)

    def normaliser(self, rollouts: list[Rollout], flat_P: torch.Tensor) -> float:
        """What the objective of all ranks is divided by. Dynamic sampling drops groups without contrast, so they do not
        count; else their replies do: they pull the mean towards 0."""
        lengths_PG = torch.tensor([len(rollout.tokens) for rollout in rollouts]).view(-1, self.config.group_size)
        counted_PG = lengths_PG[~flat_P] if self.config.dynamic_sampling else lengths_PG
        replies, tokens = self.over_ranks(counted_PG.numel(), int(counted_PG.sum()))
        return self.config.objective.normaliser(replies, tokens, self.config.max_new_tokens)

    def over_ranks(self, *counts: int) -> list[float]:
        return self.ranks.all_reduce(torch.tensor(counts, dtype=torch.float64, device=self.ranks.device)).tolist()

    def keep(self, number: int, rollouts: list[Rollout], advantages: list[float]) -> None:
        folder = Path(self.job.scratch) / ROLLOUTS
        folder.mkdir(parents=True, exist_ok=True)
        if self.ranks.rank == 0:  # what ranks left that a killed run had and this one has not
            for stale in folder.glob(f"rollouts-{number + 1:05d}-*.parquet"):
                if int(stale.stem.rsplit("-", 1)[1]) >= self.ranks.world:
                    stale.unlink()
        rows = [rollout.row(number + 1, advantage) for rollout, advantage in zip(rollouts, advantages, strict=True)]
        write_rollouts(folder / f"rollouts-{number + 1:05d}-{self.ranks.rank:03d}.parquet", rows)

    def update(self, number: int, batch: list[tuple[Rollout, float]], normaliser: float, tally: Tally) -> None:
        """`updates_per_exploration` gradient steps on the same replies (1 in the papers: the ratio is exactly 1)."""
        config, objective = self.config, self.config.objective
        cut = micro_batches(batch, self.tokenizer.pad, config.micro_batch_tokens, self.ranks.device)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (number + 1) / max(config.warmup_steps, 1))
        old_BR: list[torch.Tensor] = []
        for update in range(config.updates_per_exploration):
            self.bucket.zero()
            for index, micro in enumerate(cut):
                logprobs_BR = token_logprobs(self.model, micro, config.temperature)
                if update == 0:
                    old_BR.append(logprobs_BR.detach())
                    seen = mismatch(logprobs_BR.detach()[micro.mask_BR], micro.engine_logprobs_BR[micro.mask_BR])
                    tally.add(learned_tokens=seen.tokens, mismatch_kl=seen.kl_sum)
                    tally.peak(mismatch_max_ratio=seen.max_ratio)
                reference_BR = None
                if self.reference:
                    with torch.no_grad():
                        reference_BR = token_logprobs(self.reference, micro, config.temperature)
                correction_BR = None
                if config.importance_cap:
                    correction_BR = truncated_importance(old_BR[index], micro.engine_logprobs_BR, config.importance_cap)
                advantages_B1 = micro.advantages_B[:, None]
                loss, metrics = policy_loss(
                    PolicyBatch(logprobs_BR, old_BR[index], reference_BR, advantages_B1, micro.mask_BR, correction_BR),
                    objective,
                    normaliser,
                )
                loss.backward()
                self.bucket.collect()
                tally.add(loss=loss.item(), kl=metrics.kl, clipped=metrics.clipped, loss_tokens=metrics.tokens)
                tally.peak(max_ratio=metrics.max_ratio)
            self.bucket.reduce(self.ranks)
            norm = self.bucket.norm()
            if not math.isfinite(norm):
                raise TrainingDiverged(
                    f"step {number + 1}: gradient norm {norm}; lower learning_rate or max_gradient_norm"
                )
            if norm > 0:  # no contrast on any rank: nothing to learn, and momentum alone shall not move the weights
                self.optimizer.step(clip_factor(norm, config.max_gradient_norm))
            tally.peak(gradient_norm=norm)

    def step_flops(self, explored: list[Rollout], learned: list[Rollout]) -> float:
        """Model FLOPs of this rank's share: 2N a token for generating and for the reference, 6N for learning."""
        updates = self.config.updates_per_exploration
        passes = 3.0 * updates + (updates if self.reference else 0)
        return forward_flops(self.model.config, explored) + passes * forward_flops(self.model.config, learned)
