"""Held-out questions are found in what is asked, and other questions are not."""

import pytest

from stages.problems.contamination import HeldOut
from stages.problems.problem import Problem

LONG = "A train leaves the station at noon and travels at 80 km/h; how far has it gone by four o'clock?"
HAN = "小明有三个苹果，小红的苹果比小明多五个，两个人一共有多少个苹果？"


def problem(question: str) -> Problem:
    return Problem(question, "mine", "en", 1, question, "", "1", "boxed", {"value": "1"}, question)


@pytest.fixture(scope="module")
def heldout() -> HeldOut:
    return HeldOut(map(problem, (LONG, HAN, "What is 2 + 3?", "1+1")))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (LONG, LONG),
        (LONG.upper().replace(" ", "\n"), LONG),
        (f"Solve this. {LONG} Put the answer in a box.", LONG),
        ("It travels; a train leaves the station at noon and travels at 90 km/h.", LONG),  # ten words of it
        ("A train leaves the station at noon and stands at 70 km/h; how far has it gone by now?", None),  # eight
        (f"请回答：{HAN}", HAN),
        ("小明有三个苹果，小红的苹果比小明多六个，一共有多少个苹果？", None),  # sixteen characters
        ("Tell me, what is 2 + 3? And why?", "What is 2 + 3?"),
        ("What is 2 + 4?", None),
        (" 1+1\n", "1+1"),
        ("1+1=?", None),
        ("", None),
    ],
)
def test_a_question_is_found_whole_or_by_a_run_of_its_words(heldout: HeldOut, text: str, found: str | None) -> None:
    assert heldout.asked_in(text) == found
