"""What a reply earns among the others to its question, against values by hand."""

from __future__ import annotations

import pytest

from stages.rl.group_rewards import brevity, pay_groups
from stages.rl.rewards import RewardWeights, Score


@pytest.mark.parametrize(
    ("lengths", "right", "earned"),
    [
        ([10, 20, 30, 40, 50], [True] * 5, [0.5, 0.25, 0.0, -0.25, -0.5]),
        ([10, 20, 30, 40, 50], [False] * 5, [0.0, 0.0, 0.0, -0.25, -0.5]),  # no pay for a short mistake
        ([50, 10, 20, 50], [True, False, True, False], [-0.5, 0.0, 0.25, -0.5]),  # the shortest is wrong
        ([7, 7, 7], [True, False, True], [0.0, 0.0, 0.0]),
        ([3], [True], [0.0]),
    ],
)
def test_the_shortest_right_reply_earns_half_and_the_longest_loses_half(
    lengths: list[int], right: list[bool], earned: list[float]
) -> None:
    assert brevity(lengths, right) == earned


def test_each_group_is_paid_by_its_own_lengths_on_top_of_its_rewards() -> None:
    scores = [
        Score(reward, {"accuracy": right}, "no") for reward, right in ((1.2, 1.0), (1.0, 1.0), (0.2, 0.0), (0, 0.0))
    ]
    paid = pay_groups(scores, [4, 8, 100, 300], 2, RewardWeights(brevity=0.4))
    assert [score.reward for score in paid] == pytest.approx([1.4, 0.8, 0.2, -0.2])
    assert [(score.rules, score.reason) for score in paid] == [(score.rules, score.reason) for score in scores]
    assert pay_groups(scores, [4, 8, 100, 300], 2, RewardWeights()) == scores


def test_a_question_without_a_right_answer_pays_no_brevity() -> None:
    scores = [Score(0.2, {"format": 1.0}), Score(0.1, {"format": 1.0})]
    assert pay_groups(scores, [4, 8], 2, RewardWeights(brevity=1.0)) == scores
