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
        "<think>a</think> so <answer>5</answer>",
        "Well. <think>a</think><answer>5</answer>",
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


@pytest.mark.parametrize(
    "text",
    [
        " <think> a </think> <answer> 5 </answer>",  # as DeepSeek-R1's prompt shows it
        "<think>\na\n</think>\n\n<answer>\n5\n</answer>\n",
        "\t<think>a</think>\u3000<answer>5</answer> ",
    ],
)
def test_white_space_around_the_parts_of_a_reply_is_no_fault(text):
    verdict = score(SUM, text, True, RewardWeights())
    assert (verdict.format, verdict.accuracy) == (1, 1)


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
    assert -2 <= verdict.reward <= 4


KNIGHTS = Problem("k", "islanders", "en", 2, "?", "c", "knight knave", "roles", {"values": ["knight", "knave"]}, "k")


@pytest.mark.parametrize(
    ("text", "finished", "points"),
    [
        ("<think>a</think><answer>knight knave</answer>", True, 3.0),
        ("<think>a</think><answer>knight, knave</answer>", True, 3.0),
        ("<think>a</think><answer>knave knave</answer>", True, -0.5),
        ("<think>a</think><answer>knave</answer>", True, -1.0),
        ("<think>a</think><answer>knight or knave</answer>", True, -1.0),
        ("<think>a</think><answer></answer>", True, -1.0),
        ("knight knave", True, -3.0),
        ("<answer>knight knave</answer>", True, -3.0),  # right, and paid nothing: the form is broken
        ("<think>a</think><answer>knight knave</answer>", False, -3.0),
    ],
)
def test_logic_rl_pays_three_for_right_and_takes_three_for_a_broken_form(text, finished, points):
    assert score(KNIGHTS, text, finished, RewardWeights(scheme="logic_rl")).reward == points


def test_logic_rl_pays_in_full_where_the_parts_stand_on_lines_of_their_own():
    text = "<think>\na\n</think>\n\n<answer>\nknight, knave\n</answer>\n"
    assert score(KNIGHTS, text, True, RewardWeights(scheme="logic_rl")).reward == 3.0


GAME = Problem(
    "g", "countdown_wide", "en", 1, "?", "c", "(8+4)/2", "countdown", {"numbers": [8, 4, 2], "target": 6}, "g"
)
TIMES = Problem("t", "countdown", "en", 1, "?", "c", "", "countdown", {"numbers": [3, 8, 4, 1], "target": 6}, "t")
MATH = Problem("m", "math", "en", 1, "?", "", "1/2", "boxed", {"value": r"\frac{1}{2}"}, "m")
PROGRAM = Problem("f", "functions", "en", 1, "?", "", "", "code", {"inputs": [["", "5"]]}, "f")


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (SUM, r"<think>a</think>So it is \boxed{5}."),
        (SUM, r"a, then b</think> \[\boxed{5}\]"),  # a template opened the chain in the prompt
        (SUM, r"First \boxed{4}? No: \boxed{5}"),  # no chain at all, and the last box counts
        (MATH, r"<think>a</think>$\boxed{\dfrac{1}{2}}$"),
        (MATH, r"<think>a</think>\boxed{0.5}"),
        (GAME, r"<think>a</think>\boxed{(8+4)/2}"),
        (GAME, r"<think>a</think>\boxed{\left(8 + 4\right) \div 2}"),
        (GAME, r"<think>a</think>\boxed{\frac{8 + 4}{2}}"),
        (TIMES, r"<think>a</think>\boxed{\frac{\dfrac{3}{4} \times 8}{1}}"),
        (TIMES, r"<think>a</think>\boxed{3 \times \frac{8}{4} \cdot 1}"),
        (KNIGHTS, r"<think>a</think>\boxed{\text{knight, knave}}"),
        (KNIGHTS, r"<think>a</think>\boxed{\text{Knight},\ \text{knave}}"),
    ],
)
def test_without_tags_the_last_box_behind_the_chain_is_the_answer(problem, said):
    verdict = score(problem, said, True, RewardWeights())
    assert (verdict.accuracy, verdict.format) == (1, 0)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (SUM, r"<think>so \boxed{5}"),  # a chain that never ended
        (SUM, r"<think>so \boxed{5}</think>It is five."),
        (SUM, r"<think>a</think>\boxed{5}<think>b"),
        (SUM, r"<think>a</think>\boxed{5 or 6}"),
        (SUM, r"<think>a</think>\boxed{5"),
        (SUM, r"<think>a</think>\boxed{5} <answer>6</answer>"),  # a tag was there: what it says counts
        (SUM, r"<think>a</think>\boxed{5} <answer>"),
        (SUM, r"<think>a</think><answer>\boxed{5}</answer>"),  # only maths problems are answered in LaTeX between tags
        (SUM, r"<think>a</think>\boxed{5}, no: \boxed{6}"),
        (GAME, r"<think>a</think>\boxed{4 \times 2 - 2}"),
        (PROGRAM, r"<think>a</think>\boxed{print(5)}"),
        (PROGRAM, "<think>try\n```python\nprint(5)\n```\n"),  # nor is a program in a chain that never ended
    ],
)
def test_no_other_box_is_an_answer(problem, said):
    assert score(problem, said, True, RewardWeights()).accuracy == 0


def test_logic_rl_keeps_the_weights_that_it_does_not_replace():
    text = "<think>" + "so " * 40 + "</think><answer>knight knave</answer>"
    weights = RewardWeights(scheme="logic_rl", language=0.5, repetition=1.0)
    verdict = score(KNIGHTS, text, True, weights)
    assert verdict.reward == pytest.approx(3.5 - verdict.rules["repetition"])
    with pytest.raises(ValueError, match="scheme=logic_rl does not use accuracy"):
        RewardWeights(scheme="logic_rl", accuracy=2.0)
    with pytest.raises(ValueError, match="scheme=weighted does not use cosine"):
        RewardWeights(cosine={"cut_off": -3.0})


@pytest.mark.parametrize(
    ("text", "tokens", "finished", "points"),
    [
        (RIGHT, 0, True, 1.0),
        (RIGHT, 50, True, 0.75),
        (RIGHT, 25, True, 0.75 + 0.25 * 0.5**0.5),
        (RIGHT, 100, True, 0.5),
        ("4", 0, True, -1.0),
        ("4", 50, True, -0.75),
        ("4", 100, True, -0.5),
        (RIGHT, 100, False, -1.0),
    ],
)
def test_cosine_pays_short_right_replies_and_long_wrong_ones_more(text, tokens, finished, points):
    weights = RewardWeights(scheme="cosine", format=0.0)
    assert score(SUM, text, finished, weights, tokens=tokens, max_tokens=100).reward == pytest.approx(points)
    doubled = RewardWeights(scheme="cosine", accuracy=2.0, format=0.25)
    verdict = score(SUM, text, finished, doubled, tokens=tokens, max_tokens=100)
    assert verdict.reward == pytest.approx(2 * points + 0.25 * verdict.format)


@pytest.mark.parametrize(
    ("chain", "language", "question", "share"),
    [
        ("设 x=3，则 y=5", "zh", "", 1.0),  # variables are in no language
        ("set x to a", "en", "", 1.0),
        (r"由\frac{1}{2}得", "zh", "", 1.0),
        ("调用 add 得 5", "zh", "写函数 add。", 1.0),  # the question's own words
        ("调用 sub 得 5", "zh", "写函数 add。", 0.75),
        ("先写 `sorted(xs)` 再看", "zh", "", 1.0),
        ("先写\n```python\nreturn sorted(xs)\n```\n再看", "zh", "", 1.0),
        ("first\n```python\n# 先看\n", "en", "", 1.0),  # a block that was never closed
        ("the word 你好 means hello", "en", "What does 你好 mean?", 1.0),
        ("the word 再见 means bye", "en", "What does 你好 mean?", 4 / 6),
        ("你好", "en", "What does 你好 mean?", 0.0),  # not one word of its own
        ("`code`", "zh", "", 0.0),
    ],
)
def test_what_is_in_no_language_or_the_questions_own_is_not_held_against_a_chain(chain, language, question, share):
    assert language_consistency(chain, language, question) == pytest.approx(share)


def test_a_score_says_why_an_answer_is_wrong():
    assert score(SUM, RIGHT, True, RewardWeights()).reason == ""
    assert score(SUM, RIGHT.replace(">5<", ">6<"), True, RewardWeights()).reason == "wrong answer"
    assert score(SUM, "5", True, RewardWeights()).reason == "no single answer"


def test_the_cosine_reward_is_trls():
    trl = pytest.importorskip("trl.rewards", exc_type=ImportError)
    pytest.importorskip("math_verify")
    theirs = trl.get_cosine_scaled_reward(max_len=100)
    weights = RewardWeights(scheme="cosine", format=0.0)
    for answer in ("5", "4"):
        for tokens in (0, 1, 30, 77, 100):
            (expected,) = theirs([[{"content": rf"\boxed{{{answer}}}"}]], ["5"], [[0] * tokens])
            ours = score(SUM, f"<answer>{answer}</answer>", True, weights, tokens=tokens, max_tokens=100)
            assert ours.reward == pytest.approx(expected)
