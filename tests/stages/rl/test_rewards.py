"""Rule rewards against cases worked out by hand, and against text made to cheat them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.problems.problem import Problem
from stages.rl.rewards import (
    RULES,
    RewardWeights,
    format_reward,
    language_consistency,
    overlong,
    parse,
    repetition,
    score,
)

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


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two three four", 0.0),  # one 4-gram
        ("a b c d e f", 0.0),  # three, all different
        ("wait wait wait wait wait wait", 2 / 3),  # three, one kind
        ("a b c d a b c d", 1 / 5),  # abcd bcda cdab dabc abcd
        ("重新算一遍重新算一遍", 2 / 7),  # ten characters, seven 4-grams, five kinds
        ("!!!!!!!!", 4 / 5),
        ("3 apples, 3 apples, 3 apples", 2 / 5),  # eight units of period three
    ],
)
def test_repetition_is_the_share_of_four_grams_said_before(text, share):
    assert repetition(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("tokens", "punishment"), [(0, 0), (16_384, 0), (16_385, 1 / 4096), (18_432, 0.5), (20_480, 1), (99_999, 1)]
)
def test_overlong_is_the_line_that_dapo_draws(tokens, punishment):
    assert overlong(tokens, max_tokens=20_480, margin=4096) == pytest.approx(punishment)


def test_penalties_are_taken_off_the_reward_and_change_nothing_at_weight_zero():
    looping = "<think>" + "so " * 40 + "</think><answer>5</answer>"
    plain = score(SUM, looping, True, RewardWeights(), tokens=90, max_tokens=100)
    assert plain.reward == 1.2
    assert plain.rules["overlong"] == 0.5
    weights = RewardWeights(repetition=0.5, overlong=1.0)
    strict = score(SUM, looping, True, weights, tokens=90, max_tokens=100)
    assert strict.rules == plain.rules
    assert strict.reward == pytest.approx(1.2 - 0.5 * plain.rules["repetition"] - 0.5)


def test_every_rule_has_a_weight_of_its_name():
    assert set(RULES) < set(RewardWeights.model_fields)


@given(
    st.text() | st.text(alphabet="<>/thinkanswer 5等,\n"),
    st.booleans(),
    st.sampled_from([None, "en", "zh"]),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
)
@settings(deadline=None)
def test_every_rule_is_total_and_stays_in_range(text, finished, language, tokens, max_tokens):
    weights = RewardWeights(**dict.fromkeys(RULES, 1.0))
    verdict = score(SUM, text, finished, weights, language, tokens, max_tokens)
    assert set(verdict.rules) == set(RULES)
    assert all(0 <= value <= 1 for value in verdict.rules.values())
    assert -2 <= verdict.reward <= 3
