"""GRPO's per-worker program: plain torch, so `torchrun` can start it where there is no Ray.

Every rank holds the model, an engine of its own and the frozen reference. A step: draw the step's questions, explore
this rank's share of them, turn the rewards of each group into advantages, add this share's gradient to the flat bucket,
all-reduce once, update. Every rank explores *and* learns, so that no kind of worker waits for the other. With
`staleness` 1 a rank does both at once: while it learns, a thread asks the next step's questions of the weights as they
were before, always exactly one exploration back.

What makes a killed run continue to the last bit: the questions and the seeds of step s are functions of (seed, s,
chunk), so the models, their optimisers and what explored last are the whole state. A chunk is `rollout_groups`
questions; chunks, not ranks, own the seeds, so the replies do not depend on how many ranks share the work. Each is in
the store as soon as it is there (`rollout_store.py`): a resumed run reads back what it had explored. Dynamic sampling
asks as many further questions as groups had no contrast, from those that the step has not asked, and so needs no state.

Legend: P questions, G replies to each.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from infra.metrics import Report
from model.value import ValueModel
from stages.problems.problem import Problem
from stages.rl.algorithms import ALGORITHMS
from stages.rl.credit import flat_groups, token_advantages, token_rewards
from stages.rl.engines import open_engine
from stages.rl.engines.base import Sampling
from stages.rl.explore import Asking, Explorer
from stages.rl.judges import Judges, WeightedModel
from stages.rl.questions import Questions
from stages.rl.reward_model import load_reward_model
from stages.rl.rewards import PREFERENCE_MODELS
from stages.rl.rollout import Rollout, forward_flops
from stages.rl.rollout_store import RolloutStore
from stages.rl.tally import Tally
from stages.rl.update import Update
from stages.tokens.bpe import load_tokenizer
from stages.training.checkpoint import load_model, save_model
from stages.training.distributed import Ranks, process_group
from stages.training.resume import ResumeStore

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
    judges: Mapping[str, str] = dataclasses.field(default_factory=dict)  # folders of reward models, by input
    general: tuple[Problem, ...] = ()  # open ones, asked beside the others


@dataclasses.dataclass(frozen=True)
class Explored:
    """This rank's replies of a step, and how many chunks and groups all ranks have asked for so far."""

    rollouts: list[Rollout]
    chunks: int
    groups: int


def learn(job: GrpoJob, report: Report) -> list[dict[str, float]]:
    """Run the whole job on this rank: a row of metrics for each step. Rank 0 leaves the checkpoint in `job.out`."""
    with process_group() as ranks:
        return Learner(job, ranks).run(report)


class Learner:
    """State of one rank. `step(number)` is one exploration and its updates."""

    def __init__(self, job: GrpoJob, ranks: Ranks) -> None:
        self.job, self.config, self.ranks = job, job.config, ranks
        config, device = job.config, str(ranks.device)
        self.tokenizer = load_tokenizer(job.checkpoint)
        self.model = load_model(job.checkpoint, device)
        # RL trains the main model: the multi-token-prediction modules wait aside, unchanged, and return at the end.
        self.whole = (self.model.mtp, self.model.config)
        self.model.mtp, self.model.config = torch.nn.ModuleList(), self.model.config.replace(n_mtp=0)
        self.critic = ValueModel(copy.deepcopy(self.model)) if config.loss == "ppo" else None
        self.update = Update(config, self.model, self.critic, self.tokenizer.pad, ranks)
        beside = Questions(job.general, config.general_groups, f"{config.seed}/general") if job.general else None
        self.questions = Questions(
            job.problems, config.groups_per_step - config.general_groups, config.seed, beside=beside
        )
        self.rollouts = RolloutStore(Path(job.scratch) / ROLLOUTS)
        judges = {role: load_reward_model(folder, device) for role, folder in job.judges.items()}
        self.judges = Judges(
            {
                name: WeightedModel(judges[role], getattr(config.rewards, name))
                for name, role in PREFERENCE_MODELS.items()
                if role in judges
            },
            judges.get("process_reward_model"),
            open_only=bool(job.general),
        )
        # What explores: the model itself, or weights of its own that stay as they were while the model learns.
        self.explored_by = copy.deepcopy(self.model).requires_grad_(False) if config.staleness else self.model
        sampling = Sampling(config.max_new_tokens, temperature=config.temperature, stop_ids=(self.tokenizer.eos,))
        self.explorer = Explorer(
            open_engine(config.engine, self.explored_by, job.checkpoint),
            self.tokenizer,
            self.model.config,
            Asking(
                config.template,
                sampling,
                config.group_size,
                config.rewards,
                config.target_language,
                system_prompt=config.system_prompt,
            ),
            self.rollouts,
            self.judges,
        )
        self.stream = torch.cuda.Stream() if config.staleness and ranks.device.type == "cuda" else None
        self.taken = 0  # the step whose weights explore
        self.ahead: Future[Explored] | None = None
        self.store = ResumeStore(Path(job.scratch) / "resume")
        self.rows: list[dict[str, float]] = []  # one for each step that is done

    def run(self, report: Report) -> list[dict[str, float]]:
        self.restore()
        with ThreadPoolExecutor(1) as self.aside, self.store:
            while len(self.rows) < self.config.steps:
                self.rows.append(self.step(len(self.rows)))
                done = len(self.rows)
                if done % self.config.save_every == 0:
                    self.store.save(done, self.state())
                    self.forget()
                report(done, self.config.steps, "steps", **self.rows[-1])
        if self.ranks.rank == 0:
            self.update.policy.optimizer.join()
            self.model.mtp, self.model.config = self.whole
            save_model(self.job.out, self.model, self.job.checkpoint)
        return self.rows

    def state(self) -> dict[str, Any]:
        return {
            "update": self.update.state(),
            "explored_by": self.explored_by.state_dict() if self.config.staleness else None,
            "taken": self.taken,
            "rows": self.rows,
        }

    def restore(self) -> None:
        """Take up the newest saved state, if there is one."""
        state = self.store.load()
        if state is not None:
            self.update.load(state["update"])
            if self.config.staleness:
                self.explored_by.load_state_dict(state["explored_by"])
                self.explorer.take(self.explored_by.state_dict().items())
            self.taken, self.rows = state["taken"], state["rows"]
        self.ranks.barrier()  # all have read before rank 0 may write

    def forget(self) -> None:
        """Drop the rollouts that no saved state would ask for again, but for those to be kept."""
        if self.ranks.rank == 0:
            oldest = min(self.store.steps(), default=0)
            self.rollouts.keep(lambda step: step > oldest or self.config.keeps(step))

    def step(self, number: int) -> dict[str, float]:
        """Explore, learn, measure. The row of metrics is the same on every rank."""
        config = self.config
        tally = Tally(config.languages, self.judges.names, critic=self.critic is not None)
        if config.reference_renew_every and number and number % config.reference_renew_every == 0:
            self.update.renew_reference()
        started = time.monotonic()
        rollouts = self.explore(number)
        staleness = number - self.taken
        explored = time.monotonic()
        if config.staleness and number + 1 < config.steps:
            self.take(number)
            self.ahead = self.aside.submit(self.ask_first, number + 1)
        flat_P = flat_groups(rollouts, config.group_size)
        tally.explored(rollouts, groups=len(flat_P), flat_groups=int(flat_P.sum()))
        batch = self.credited(rollouts)
        looked_at = [] if batch else rollouts[: config.group_size]
        self.update.learn(number, batch, *self.counts(rollouts, flat_P), tally, looked_at)
        tally.add(flops=self.step_flops(rollouts, [rollout for rollout, _ in batch]))
        tally.add(flops=forward_flops(self.model.config, looked_at))
        row = tally.reduce(self.ranks)
        row["flops"] += self.rows[-1]["flops"] if self.rows else 0.0  # spent so far
        seconds = time.monotonic() - started
        return row | {
            "staleness": staleness,
            "tokens_per_second": row["reply_tokens"] / seconds,
            "generation_share": (explored - started) / seconds,
        }

    def take(self, number: int) -> None:
        """Explore from now on with the weights of step `number`, as they are before it is learnt."""
        self.explorer.take(self.model.state_dict().items())
        if self.stream:  # which reads the copies
            self.stream.wait_stream(torch.cuda.current_stream())
        self.taken = number

    def explore(self, number: int) -> list[Rollout]:
        """This rank's share of the step's groups, and of those that replace groups without contrast."""
        config = self.config
        if number == 0 or not config.staleness:
            self.take(number)
        if config.staleness:
            found = (self.ahead or self.aside.submit(self.ask_first, number)).result()
        else:
            found = self.ask_first(number)
        spare = self.questions.spare(number) if config.dynamic_sampling else []
        for _ in range(config.dynamic_sampling):
            (useful,) = self.over_ranks(int((~flat_groups(found.rollouts, config.group_size)).sum()))
            missing = config.groups_per_step - int(useful)
            further, spare = spare[:missing], spare[missing:]
            if not further:
                break
            found = self.ask(number, further, found)
        if self.ranks.rank == 0:
            self.rollouts.cut(number + 1, found.chunks)
        return found.rollouts

    def ask_first(self, number: int) -> Explored:
        """The step's own questions. It may run beside the learner: on a stream of its own, without collectives."""
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            return self.ask(number, self.questions.asked(number), Explored([], 0, 0))

    def ask(self, number: int, problems: list[Problem], before: Explored) -> Explored:
        """`before`, and this rank's share of the replies to further problems of step `number`."""
        size, seed = self.config.rollout_groups, self.config.seed
        rollouts, chunk = list(before.rollouts), before.chunks
        for first in range(0, len(problems), size):
            if chunk % self.ranks.world == self.ranks.rank:
                draw = Random(f"{seed}/{number}/{chunk}").getrandbits(62)
                part = problems[first : first + size]
                rollouts += self.explorer.chunk(number + 1, chunk, before.groups + first, part, draw)
            chunk += 1
        return Explored(rollouts, chunk, before.groups + len(problems))

    def credited(self, rollouts: list[Rollout]) -> list[tuple[Rollout, list[float]]]:
        """The replies to learn from, and what each of their tokens is given: a critic makes advantages of rewards.

        Without an advantage (all of a group without contrast) a reply has no policy gradient, only its KL term: leaving
        it out saves its forward and backward, and costs that pull towards the reference.
        """
        config = self.config
        by_step = config.step_credit, config.progress_weight
        if self.critic:
            return list(zip(rollouts, token_rewards(rollouts, config.group_size, *by_step), strict=True))
        advantages = token_advantages(rollouts, config.group_size, ALGORITHMS[config.loss], *by_step)
        return [(rollout, row) for rollout, row in zip(rollouts, advantages, strict=True) if any(row)]

    def counts(self, rollouts: list[Rollout], flat_P: torch.Tensor) -> list[float]:
        """(replies, tokens) of all ranks that the objective is a mean of. Dynamic sampling drops groups without
        contrast, so they do not count; else their replies do: they pull the mean towards 0."""
        lengths_PG = torch.tensor([len(rollout.tokens) for rollout in rollouts]).view(-1, self.config.group_size)
        counted_PG = lengths_PG[~flat_P] if self.config.dynamic_sampling else lengths_PG
        return self.over_ranks(counted_PG.numel(), int(counted_PG.sum()))

    def over_ranks(self, *counts: int) -> list[float]:
        return self.ranks.all_reduce(torch.tensor(counts, dtype=torch.float64, device=self.ranks.device)).tolist()

    def step_flops(self, explored: list[Rollout], learned: list[Rollout]) -> float:
        """Model FLOPs of this rank's share: 2N a token for generating, judging and the reference, 6N for learning."""
        config, passes = self.model.config, 3.0 * self.config.updates_per_exploration
        spent = forward_flops(config, explored) + self.judges.flops(explored)
        spent += (passes + bool(self.update.reference)) * forward_flops(config, learned)
        return spent + (passes * forward_flops(config, learned, head=False) if self.critic else 0.0)
