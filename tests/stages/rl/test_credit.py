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


def rollout(reward, length=4, steps=()):
    return Rollout(None, [1], list(range(length)), [0.0] * length, True, "", Score(reward, {}), steps)


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


def test_a_critic_is_told_what_a_token_earns():
    assert token_rewards([rollout(2.0, 4, ((1, 0.5), (3, 0.25))), rollout(1.0, 1)]) == [[0, 0.5, 0, 2.25], [1.0]]


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
