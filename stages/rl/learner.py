"""GRPO's per-worker program: plain torch, so `torchrun` can start it where there is no Ray.

Every rank holds the model, an engine of its own and the frozen reference. A step: draw the step's questions, explore
this rank's share of them, turn the rewards of each group into advantages, add this share's gradient to the flat bucket,
all-reduce once, update. Every rank explores *and* learns, so that no kind of worker waits for the other.

What makes a killed run continue to the last bit: the questions and the seeds of step s are functions of (seed, s,
chunk), so the model, the optimiser and the reference are the whole state. A chunk is `rollout_groups` questions;
chunks, not ranks, own the seeds, so the replies do not depend on how many ranks share the work. Each is in the store as
soon as it is there (`rollout_store.py`): a resumed run reads back what it had explored. Dynamic sampling asks as many
further questions as groups had no contrast, from those that the step has not asked, and so needs no state.

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
from stages.rl.explore import Asking, Explorer
from stages.rl.micro_batch import micro_batches, token_logprobs
from stages.rl.mismatch import mismatch, truncated_importance
from stages.rl.policy_loss import PolicyBatch, policy_loss
from stages.rl.questions import Questions
from stages.rl.rollout import Rollout, forward_flops
from stages.rl.rollout_store import RolloutStore
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
        self.questions = Questions(job.problems, self.config.groups_per_step, self.config.seed)
        self.rollouts = RolloutStore(Path(job.scratch) / ROLLOUTS)
        self.explorer = Explorer(
            open_engine(self.config.engine, self.model, job.checkpoint),
            self.tokenizer,
            self.model.config,
            self.asking(),
            self.rollouts,
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
                    self.forget()
                report(done, self.config.steps, "steps", **self.rows[-1])
        if self.ranks.rank == 0:
            self.optimizer.join()
            self.model.mtp, self.model.config = self.whole
            save_model(self.job.out, self.model, self.job.checkpoint)
        return self.rows

    def asking(self) -> Asking:
        config = self.config
        sampling = Sampling(config.max_new_tokens, temperature=config.temperature, stop_ids=(self.tokenizer.eos,))
        return Asking(config.template, sampling, config.group_size, config.rewards, config.target_language)

    def forget(self) -> None:
        """Drop the rollouts that no saved state would ask for again, but for those to be kept."""
        if self.ranks.rank == 0:
            oldest = min(self.store.steps(), default=0)
            self.rollouts.keep(lambda step: step > oldest or self.config.keeps(step))

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

    def explore(self, number: int) -> list[Rollout]:
        """This rank's share of the step's groups, and of those that replace groups without contrast."""
        config = self.config
        self.explorer.take(self.model.state_dict().items())
        rollouts, chunks = self.ask(number, 0, 0, self.questions.asked(number))
        spare = self.questions.spare(number) if config.dynamic_sampling else []
        groups = config.groups_per_step
        for _ in range(config.dynamic_sampling):
            (useful,) = self.over_ranks(int((~without_contrast(self.rewards_of(rollouts))).sum()))
            missing = config.groups_per_step - int(useful)
            further, spare = spare[:missing], spare[missing:]
            if not further:
                break
            more, chunks = self.ask(number, chunks, groups, further)
            rollouts += more
            groups += len(further)
        if self.ranks.rank == 0:
            self.rollouts.cut(number + 1, chunks)
        return rollouts

    def ask(self, number: int, chunk: int, group: int, problems: list[Problem]) -> tuple[list[Rollout], int]:
        """(this rank's share of the replies to `problems`, the number of the next chunk); `chunk` and `group` are the
        first numbers that step `number` has not used."""
        size, seed = self.config.rollout_groups, self.config.seed
        rollouts: list[Rollout] = []
        for first in range(0, len(problems), size):
            if chunk % self.ranks.world == self.ranks.rank:
                draw = Random(f"{seed}/{number}/{chunk}").getrandbits(62)
                part = problems[first : first + size]
                rollouts += self.explorer.chunk(number + 1, chunk, group + first, part, draw)
            chunk += 1
        return rollouts, chunk

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
