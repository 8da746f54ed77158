"""From the rewards of replies to what each of their tokens is given.

Outcome supervision gives every token of a reply the same. Process supervision adds, from each step on, the normalised
rewards of the steps to come (DeepSeekMath, section 4.1.3): without weights on the outcome, that alone.

Legend: P questions, G replies to each, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.rl.advantages import process_supervised, without_contrast
from stages.rl.algorithms import Algorithm
from stages.rl.rollout import Rollout


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


def token_advantages(rollouts: Sequence[Rollout], group_size: int, algorithm: Algorithm) -> list[list[float]]:
    """The advantage of each token of each reply."""
    assert algorithm.advantages is not None, algorithm
    outcome_PG = algorithm.advantages(rewards_of(rollouts, group_size))
    if not any(rollout.steps for rollout in rollouts):
        pairs = zip(rollouts, outcome_PG.flatten().tolist(), strict=True)
        return [[advantage] * len(rollout.tokens) for rollout, advantage in pairs]
    longest = max(len(rollout.tokens) for rollout in rollouts)
    rewards_NT = torch.tensor([_at_tokens(r, longest) for r in rollouts], dtype=torch.float64)
    ends_NT = torch.zeros(rewards_NT.shape, dtype=torch.float64)
    for number, rollout in enumerate(rollouts):
        ends_NT[number, [end for end, _ in rollout.steps]] = 1
    shape = (-1, group_size, longest)
    advantages_PGT = outcome_PG[..., None] + process_supervised(rewards_NT.view(shape), ends_NT.view(shape))
    flat = advantages_PGT.flatten(0, 1).tolist()
    return [row[: len(rollout.tokens)] for rollout, row in zip(rollouts, flat, strict=True)]


def token_rewards(rollouts: Sequence[Rollout]) -> list[list[float]]:
    """What each token of each reply earns: a step's reward where it ends, and the reply's on its last token."""
    earned = []
    for rollout in rollouts:
        row = _at_tokens(rollout, len(rollout.tokens))
        row[-1] += rollout.score.reward
        earned.append(row)
    return earned


def _at_tokens(rollout: Rollout, length: int) -> list[float]:
    """The rewards of a reply's steps where they end, 0 elsewhere."""
    row = [0.0] * length
    for end, reward in rollout.steps:
        row[end] += reward
    return row
