"""Signs of reasoning, counted by hand in both languages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.rl.emergence import BACKTRACKING, MEASURES, REFLECTION, VERIFICATION, count, measure


@pytest.mark.parametrize(
    ("chain", "reflections", "verification", "backtracking"),
    [
        ("", 0, 0, 0),
        ("first 17+25=42, then 42-8=34", 0, 0, 0),
        ("Wait, wait. That's an aha moment I can flag here.", 2, 0, 1),
        ("The waiter butters the checkout.", 0, 0, 0),  # parts of words are no signs
        ("That is wrong. No, let me try again and check it.", 2, 1, 1),
        ("I double-check the sum", 1, 1, 0),
        ("先算17+25=42，再算42-8=34", 0, 0, 0),
        ("等等，不对，重新算一遍，再验证一下", 3, 1, 1),
        ("等等wait", 2, 0, 1),
        ("我们检查答案：没有错误", 2, 1, 0),
    ],
)
def test_signs_are_counted_as_a_reader_would(chain, reflections, verification, backtracking):
    expected = {"reflections": reflections, "verification": verification, "backtracking": backtracking}
    assert measure(chain) == expected


def test_every_phrase_of_the_lists_is_found_once():
    for sign, phrases in (("reflections", REFLECTION), ("verification", VERIFICATION), ("backtracking", BACKTRACKING)):
        for phrase in (*phrases["en"], *phrases["zh"]):
            assert count(f"so {phrase} 17", sign) == 1, (sign, phrase)


@given(st.text())
def test_any_text_has_finite_measures(text):
    figures = measure(text)
    assert tuple(figures) == MEASURES
    assert figures["reflections"] >= 0
    assert {figures["verification"], figures["backtracking"]} <= {0, 1}
