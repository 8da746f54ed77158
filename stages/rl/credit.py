"""From the rewards of replies to what each of their tokens is given.

Outcome supervision gives every token of a reply the same. Process supervision adds what a process model says of steps,
in one of two forms; without weights on the outcome, that alone.

`sum`       from each step on, the normalised scores of the steps to come (DeepSeekMath, section 4.1.3). Where the score
            is how likely a right answer still is, every step pays again for what the steps before it have done.
`progress`  what the step itself changed of the score (Setlur et al. 2024, Rewarding Progress, 2410.08146, section 3).
            The last step comes to the verdict on the answer, not to the model's guess of it, so that all progress of a
            reply sums up to what the rules say, less what the question promised. It weighs α beside the outcome.

Legend: P questions, G replies to each, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from stages.rl.advantages import own_step, process_supervised, progress, without_contrast
from stages.rl.algorithms import Algorithm
from stages.rl.rollout import Rollout

StepCredit = Literal["sum", "progress"]


def rewards_of(rollouts: Sequence[Rollout], group_size: int) -> Tensor:
    """[P, G] fp64 of groups that lie side by side."""
    return torch.tensor([rollout.score.reward for rollout in rollouts], dtype=torch.float64).view(-1, group_size)


def flat_groups(rollouts: Sequence[Rollout], group_size: int) -> Tensor:
    """[P] bool: which groups say nothing about what was better, of their replies and of their steps."""
    flat_P = without_contrast(rewards_of(rollouts, group_size))
    for p in range(len(flat_P)):
        steps = {reward for r in rollouts[p * group_size : (p + 1) * group_size] for _, reward in r.steps}
        flat_P[p] &= len(steps) < 2
    return flat_P


def token_advantages(
    rollouts: Sequence[Rollout],
    group_size: int,
    algorithm: Algorithm,
    credit: StepCredit = "sum",
    progress_weight: float = 1.0,
) -> list[list[float]]:
    """The advantage of each token of each reply."""
    assert algorithm.advantages is not None, algorithm
    outcome_PG = algorithm.advantages(rewards_of(rollouts, group_size))
    if not any(rollout.steps for rollout in rollouts):
        pairs = zip(rollouts, outcome_PG.flatten().tolist(), strict=True)
        return [[advantage] * len(rollout.tokens) for rollout, advantage in pairs]
    rewards_PGT, ends_PGT = step_rewards(rollouts, group_size, credit, progress_weight)
    supervised = {"sum": process_supervised, "progress": own_step}[credit]
    advantages_PGT = outcome_PG[..., None] + supervised(rewards_PGT, ends_PGT)
    flat = advantages_PGT.flatten(0, 1).tolist()
    return [row[: len(rollout.tokens)] for rollout, row in zip(rollouts, flat, strict=True)]


def token_rewards(
    rollouts: Sequence[Rollout], group_size: int, credit: StepCredit = "sum", progress_weight: float = 1.0
) -> list[list[float]]:
    """What each token of each reply earns: a step's reward where it ends, and the reply's on its last token."""
    earned = []
    rewards_PGT, _ = step_rewards(rollouts, group_size, credit, progress_weight)
    for rollout, row in zip(rollouts, rewards_PGT.flatten(0, 1).tolist(), strict=True):
        row = row[: len(rollout.tokens)]
        row[-1] += rollout.score.reward
        earned.append(row)
    return earned


def step_rewards(
    rollouts: Sequence[Rollout], group_size: int, credit: StepCredit, progress_weight: float
) -> tuple[Tensor, Tensor]:
    """([P, G, T] fp64 of the rewards of steps where they end, [P, G, T] of 1 there), 0 elsewhere. Of several steps that
    end with one token the last counts."""
    shape = (len(rollouts), max(len(rollout.tokens) for rollout in rollouts))
    rewards_NT, ends_NT = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for number, rollout in enumerate(rollouts):
        for end, score in rollout.steps:
            rewards_NT[number, end], ends_NT[number, end] = score, 1
        if rollout.steps and credit == "progress":
            rewards_NT[number, rollout.steps[-1][0]] = rollout.score.accuracy
    rewards_PGT, ends_PGT = (x_NT.view(-1, group_size, shape[1]) for x_NT in (rewards_NT, ends_NT))
    if credit == "progress":
        rewards_PGT = progress_weight * progress(rewards_PGT, ends_PGT)
    return rewards_PGT, ends_PGT
