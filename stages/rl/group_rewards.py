"""Rewards of a reply among the others to its question.

They are paid on top of the rules and not kept beside them: like advantages, they are functions of what rollouts have of
a whole group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from stages.rl.rewards import RewardWeights, Score


def brevity(lengths: Sequence[int], right: Sequence[bool]) -> list[float]:
    """Kimi k1.5's length reward of each reply of one group (2501.12599, section 2.3.3), in [−0.5, 0.5].

    λ = 0.5 − (length − shortest) / (longest − shortest) if it is right, min(0, λ) if it is wrong; 0 for all where all
    are of one length. So brevity pays the right alone, and costs the long whether right or wrong.
    """
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return [0.0] * len(lengths)
    shares = (0.5 - (length - shortest) / (longest - shortest) for length in lengths)
    return [share if good else min(0.0, share) for share, good in zip(shares, right, strict=True)]


def pay_groups(scores: Sequence[Score], lengths: Sequence[int], group_size: int, weights: RewardWeights) -> list[Score]:
    """The scores with what they earn in their groups, which lie side by side; `lengths` in tokens, the EOS included.

    A group whose question has no right answer earns nothing by its lengths.
    """
    assert len(scores) == len(lengths), (len(scores), len(lengths))
    assert len(scores) % group_size == 0, (len(scores), group_size)
    if not weights.brevity:
        return list(scores)
    paid: list[Score] = []
    for first in range(0, len(scores), group_size):
        group = scores[first : first + group_size]
        if "accuracy" not in group[0].rules:
            paid += group
            continue
        earned = brevity(lengths[first : first + group_size], [score.accuracy == 1 for score in group])
        paid += [
            dataclasses.replace(score, reward=score.reward + weights.brevity * points)
            for score, points in zip(group, earned, strict=True)
        ]
    return paid
