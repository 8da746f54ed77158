"""Rule rewards against cases worked out by hand, and against text made to cheat them."""

import pytest

from stages.problems.problem import Problem
from stages.rl.rewards import RewardWeights, format_reward, language_consistency, parse, score

SUM = Problem("p", "chain_sum", "en", 1, "Compute 2+3.", "first 2+3=5", "5", "integer", {"value": 5}, "2+3")
RIGHT = "<think>first 2+3=5</think><answer>5</answer>"


def test_a_right_and_well_formed_reply_earns_every_part():
    verdict = score(SUM, RIGHT, True, RewardWeights(accuracy=1.0, format=0.25, language=0.5))
    assert (verdict.accuracy, verdict.format, verdict.language, verdict.reward) == (1, 1, 1, 1.75)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "<answer>5</answer>",
        "<think>a</think> <answer>5</answer>",
        "<think>a</think><answer>5</answer>!",
        "<think>a</think><answer>5</answer><answer>5</answer>",
        "<think><think>a</think></think><answer>5</answer>",
        "<think>a</think><think>b</think><answer>5</answer>",
        "<think>a<answer>5</answer></think><answer>5</answer>",
        "<answer>5</answer><think>a</think>",
        "<think>a</think><answer>5</answer><｜User｜>more",
        "<think></think><answer>5</answer>",
        "<think>  </think><answer>5</answer>",
        "<THINK>a</THINK><answer>5</answer>",
    ],
)
def test_anything_but_the_exact_form_earns_no_format_reward(text):
    assert format_reward(text, finished=True) == 0


def test_a_reply_that_was_cut_off_is_not_well_formed_but_may_be_right():
    verdict = score(SUM, RIGHT, False, RewardWeights())
    assert (verdict.format, verdict.accuracy) == (0, 1)


@pytest.mark.parametrize(
    "text",
    [
        "<think>x</think><answer>5 or 6</answer>",
        "<think>x</think><answer>4</answer><answer>5</answer>",
        "<think>5</think>",
        "<answer>5",
        "<think>x</think><answer>" + "9" * 9999 + "</answer>",
        "</answer>5<answer>",
    ],
)
def test_offering_several_answers_or_none_is_wrong(text):
    assert score(SUM, text, True, RewardWeights()).accuracy == 0


@pytest.mark.parametrize(
    ("chain", "language", "share"),
    [
        ("first 17+25=42, then 42-8=34", "en", 1.0),
        ("先算17+25=42，再算42-8=34", "zh", 1.0),
        ("先算17+25=42, then 42-8=34", "zh", 2 / 3),
        ("先then", "en", 0.5),
        ("先then", "zh", 0.5),
        ("17+25=42", "en", 0.0),
        ("", "zh", 0.0),
        ("сначала then", "en", 0.5),
        ("сначала", "zh", 0.0),
        ("then先", "zh", 0.5),
    ],
)
def test_language_consistency_is_the_share_of_target_words(chain, language, share):
    assert language_consistency(chain, language) == pytest.approx(share)


def test_a_target_language_overrides_the_questions_own():
    assert score(SUM, RIGHT, True, RewardWeights(language=1.0), "zh").language == 0
    assert parse(RIGHT).answer == "5"
