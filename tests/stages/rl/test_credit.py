"""What tokens are given for the rewards of replies and of their steps, and where in a reply a step ends."""

import math

import pytest

from stages.rl.algorithms import ALGORITHMS
from stages.rl.credit import flat_groups, token_advantages, token_rewards
from stages.rl.judges import step_ends
from stages.rl.rewards import Score
from stages.rl.rollout import Rollout
from stages.rl.steps import split_steps
from stages.tokens.bpe import train

GRPO = ALGORITHMS["grpo"]


def rollout(reward, length=4, steps=(), right=0.0):
    return Rollout(None, [1], list(range(length)), [0.0] * length, True, "", Score(reward, {"accuracy": right}), steps)


def test_outcome_supervision_gives_every_token_of_a_reply_its_replys_advantage():
    group = [rollout(1.0, 3), rollout(0.0, 2), rollout(0.5, 1), rollout(0.5, 2)]
    flat = [rollout(0.7, 2)] * 4
    expected = 0.5 / math.sqrt(0.125)
    given = token_advantages(group + flat, 4, GRPO)
    assert given[:4] == [pytest.approx([expected] * 3), pytest.approx([-expected] * 2), [0.0], [0.0, 0.0]]
    assert given[4:] == [[0.0, 0.0]] * 4
    assert flat_groups(group + flat, 4).tolist() == [False, True]


def test_process_supervision_alone_gives_each_token_the_steps_to_come():
    # Step rewards 1, 0 and 2 of one group: mean 1, population std √(2/3).
    group = [rollout(0.0, 4, ((1, 1.0), (3, 0.0))), rollout(0.0, 3, ((2, 2.0),))]
    unit = 1 / math.sqrt(2 / 3)
    assert token_advantages(group, 2, GRPO) == [pytest.approx([-unit] * 4), pytest.approx([unit] * 3)]
    assert flat_groups(group, 2).tolist() == [False]
    assert flat_groups([rollout(0.0, 4, ((1, 0.5), (3, 0.5))), rollout(0.0, 3, ((2, 0.5),))], 2).tolist() == [True]


def test_with_weights_on_the_outcome_its_advantage_comes_on_top():
    steps = [rollout(0.0, 4, ((1, 1.0), (3, 0.0))), rollout(0.0, 3, ((2, 2.0),))]
    both = [rollout(1.0, 4, ((1, 1.0), (3, 0.0))), rollout(0.0, 3, ((2, 2.0),))]
    alone, given = token_advantages(steps, 2, GRPO), token_advantages(both, 2, GRPO)
    assert given == [pytest.approx([a + 1 for a in alone[0]]), pytest.approx([a - 1 for a in alone[1]])]


def test_progress_gives_each_token_what_its_own_step_changed_up_to_the_verdict():
    # A right reply, whose last step the model scores low, and a wrong one, whose last step it scores high.
    group = [rollout(1.0, 4, ((1, 0.75), (3, 0.1)), 1.0), rollout(0.0, 3, ((0, 0.25), (2, 0.9)))]
    # Before the first step (0.75 + 0.25) / 2: progress 0.25, 1 − 0.75 and −0.25, 0 − 0.25; the outcome's are ±1.
    assert token_advantages(group, 2, GRPO, "progress", 2.0) == [[1.5] * 4, [-1.5] * 3]
    silent = [rollout(0.0, 2), *[rollout(0.0, 4, ((1, 0.5), (3, 0.5)))] * 2, rollout(0.0, 1)]
    late = [0.0, 0.0, -0.5, -0.5]
    assert token_advantages(silent, 4, GRPO, "progress") == [[0.0, 0.0], late, late, [0.0]]


def test_many_steps_are_worth_more_by_sum_and_no_more_by_progress():
    """Two wrong replies, both scored 0.6 throughout, of two steps and of six, beside one scored 0.2."""
    two, six = (rollout(0.0, 6, tuple((end, 0.6) for end in range(5 - n + 1, 6))) for n in (2, 6))
    group = [two, six, rollout(0.0, 6, ((2, 0.2), (5, 0.2)))]
    by_sum, by_progress = (token_advantages(group, 3, GRPO, credit) for credit in ("sum", "progress"))
    assert by_sum[1][0] == pytest.approx(3 * by_sum[0][0])
    assert by_progress[1][0] == by_progress[0][0]
    assert by_progress[1][1:5] == [0.0] * 4


def test_a_critic_is_told_what_a_token_earns():
    replies = [rollout(2.0, 4, ((1, 0.5), (3, 0.25)), 1.0), rollout(1.0, 1)]
    assert token_rewards(replies, 2) == [[0, 0.5, 0, 2.25], [1.0]]
    assert token_rewards(replies, 2, "progress") == [[0, 0.0, 0, 2.5], [1.0]]
    assert token_rewards(replies, 2, "progress", 3.0) == [[0, 0.0, 0, 3.5], [1.0]]


@pytest.mark.parametrize(
    "text",
    [
        "<think>first 3+4=7, then 7-2=5</think><answer>5</answer>",
        "<think>先算三加四得七，再减二得五</think><answer>5</answer>",
        "no tags at all",
        "<think>one.\ntwo.\nthree</think><answer>",
    ],
)
def test_a_step_ends_with_the_token_that_says_its_last_character(text):
    tokenizer = train(["first then 先算 再减"], 280, digits="single", min_frequency=1)
    tokens = [*tokenizer.encode(text), tokenizer.eos]
    steps = split_steps(text)
    ends = step_ends(tokens, steps, tokenizer)
    assert ends[-1] == len(tokens) - 1
    for number, end in enumerate(ends[:-1], start=1):
        assert tokenizer.decode(tokens[: end + 1]) == "".join(steps[:number])
        assert tokenizer.decode(tokens[:end]) != "".join(steps[:number])
    assert step_ends(tokens, [], tokenizer) == []
