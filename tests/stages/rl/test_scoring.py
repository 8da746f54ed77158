"""Programs are run side by side, and their scores are those of one after the other."""

from __future__ import annotations

import threading

import pytest

from infra.errors import ConfigError
from stages.problems.problem import Problem
from stages.problems.programs import runner
from stages.problems.registry import generate
from stages.rl import scoring
from stages.rl.rewards import RewardWeights, Score, score
from stages.rl.scoring import score_all

SUM = Problem("s", "sums", "en", 1, "1+1?", "", "2", "integer", {"value": 2}, "1+1")


@pytest.fixture(scope="module")
def tasks() -> list[Problem]:
    try:
        runner()
    except ConfigError as error:
        pytest.skip(str(error))
    return generate(("functions",), ("en", "zh"), 4, 0, "train")


def test_scores_of_programs_and_of_numbers_keep_the_order_of_their_replies(tasks: list[Problem]) -> None:
    problems = [tasks[0], SUM, tasks[1], tasks[2], SUM, tasks[3]]
    answers = [tasks[0].answer, "2", "def f(:", tasks[2].answer, "3", "while True: pass"]
    problems[-1] = Problem(**{**vars(tasks[3]), "arguments": {**tasks[3].arguments, "limits": {"cpu_seconds": 1}}})

    def judge(place: int) -> Score:
        text = f"<think>so</think><answer>{answers[place]}</answer>"
        return score(problems[place], text, True, RewardWeights())

    together = score_all(judge, range(6), problems)
    assert [found.accuracy for found in together] == [1, 1, 0, 1, 0, 0]
    assert [found.reason.partition(":")[0] for found in together] == ["", "", "error", "", "wrong answer", "timeout"]
    assert together == [judge(place) for place in range(6)]


def test_programs_run_at_once_and_all_else_in_the_thread_that_asks(
    tasks: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "cores", lambda: 2)
    both = threading.Barrier(2, timeout=20)  # which one thread alone would never pass
    threads: dict[int, int] = {}

    def judge(place: int) -> Score:
        threads[place] = threading.get_ident()
        if place != 1:
            both.wait()
        return Score(float(place), {})

    found = score_all(judge, range(3), [tasks[0], SUM, tasks[1]])
    assert [score.reward for score in found] == [0, 1, 2]
    assert threads[1] == threading.get_ident()
    assert len(set(threads.values())) == 3


def test_a_mistake_of_one_ends_them_all(tasks: list[Problem]) -> None:
    def judge(place: int) -> Score:
        raise ConfigError("sandbox: gone")

    with pytest.raises(ConfigError, match="gone"):
        score_all(judge, range(3), tasks[:3])
