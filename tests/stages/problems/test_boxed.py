r"""Answers in LaTeX and plain text against gold answers: numbers exactly, formulas by math-verify, bombs not at all."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError
from stages.problems import boxed as module
from stages.problems.boxed import boxed, cut, readings, require, tidy
from stages.problems.problem import Problem
from stages.problems.selection import ProblemFilter
from stages.problems.symbolic import Comparer
from stages.problems.verify import ballot, verify


def problem(gold):
    return Problem("maths-1", "maths", "en", 1, "?", "", gold, "boxed", {"value": gold}, "?")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so it is \boxed{4}.", "4"),
        (r"\boxed{3} no, \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}} as said", r"\frac{1}{2}"),
        (r"\boxed {x}", "x"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{4} and \boxed{5", "4"),
        (r"最终答案：\boxed{3/4}。", "3/4"),
        ("3/4", "3/4"),
        (r"\boxed{3", r"\boxed{3"),
        ("", ""),
    ],
)
def test_the_answer_is_the_last_box_that_closes_or_the_whole_text(text, answer):
    assert cut(text) == answer


def test_cutting_takes_one_pass_over_the_text():
    started = time.monotonic()
    assert cut(r"\boxed{" * 100_000) == r"\boxed{" * 100_000
    assert cut(r"\boxed{" * 100_000 + "}" * 100_000) == ""
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", "7"),
        ("-7", "-7"),
        ("+7", "7"),
        ("007", "7"),
        ("3,000", "3000"),
        ("1,234,567.5", "1234567.5"),
        ("3 000", None),
        (r"12{,}345", None),
        (r"12,\!345", "12345"),
        ("12, 345", None),  # a list
        ("- 3 / 4", "-3/4"),
        ("0.75", "3/4"),
        (".5", "1/2"),
        ("3/4", "3/4"),
        ("-6/8", "-3/4"),
        (r"\frac{3}{4}", "3/4"),
        (r"\dfrac{3}{4}", "3/4"),
        (r"\frac34", "3/4"),
        (r"-\frac{3}{4}", "-3/4"),
        (r"\frac{-3}{4}", "-3/4"),
        (r"3\frac{1}{2}", "7/2"),
        ("3 1/2", "7/2"),
        ("$7$", "7"),
        (r"\(7\)", "7"),
        (r"\$7.50", "15/2"),
        ("x = 7", "7"),
        (r"5 \text{ cm}", "5"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        ("90°", "90"),
        ("７．５", "15/2"),
        ("７。", "7"),
        ("−7", "-7"),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        ("5 or 7", None),
        ("5, 7", None),
        ("5 7", None),
        ("5=7", None),
        ("12 apples and 13 pears", None),
        ("1e3", None),
        ("٣", None),
        ("x", None),
        ("", None),
    ],
)
def test_a_number_is_read_exactly_whatever_its_spelling(text, value):
    assert readings(tidy(text)) == (frozenset() if value is None else {Fraction(value)})


NUMBERS = [
    ("5", "x=5", True),
    ("3000", "3,000", True),
    ("3/4", r"\boxed{\frac{6}{8}}", True),
    ("3/4", "最终答案：\\boxed{3/4}", True),
    ("3/4", "最终答案：3/4", False),  # not cut out: an answer must be the answer
    ("0.5", r"50\%", True),
    (r"50\%", "50", True),
    (r"50\%", "0.5", True),
    ("50", "0.5", False),
    ("7", "5 or 6 or 7", False),
    ("7", "5, 6, 7", False),
    ("7", r"5 \text{ or } 7", False),
    ("7", r"\boxed{5}, \boxed{7}", True),  # the last one counts
    ("7", r"\boxed{7}, \boxed{5}", False),
    ("13", "12 apples and 13 pears", False),
    ("7", "The answer is 7", False),
    ("7", "5} or {7", False),
    ("408", r"17 \cdot 24", False),  # the question is no answer
    ("1/3", "0.3333333333", False),
    ("7", "", False),
    ("", "", False),
    ("7", "9^{9^{9^9}}", False),
    ("7", "(" * 400 + "7" + ")" * 400, False),
    ("7", "7" * 100_000, False),
    (7, "7", True),  # a wrong type in the record is read as text
    (None, "7", False),
]


@pytest.mark.parametrize(("gold", "text", "right"), NUMBERS)
def test_numbers_are_judged_without_math_verify(gold, text, right, monkeypatch):
    monkeypatch.setattr(module, "equivalent", lambda gold, said: False)
    assert verify(problem(gold), text) is right


FORMULAS = [
    (r"2\sqrt{2}", r"\sqrt{8}", True),
    (r"2\sqrt{2}", r"2√2", True),
    (r"2\sqrt{2}", r"$2\sqrt{2}$.", True),
    (r"2\sqrt{2}", "2.83", False),
    (r"x^2+2x+1", "(x+1)^2", True),
    (r"x^2+2x+1", "(x+2)^2", False),
    ("(1, 2)", "（1，2）", True),
    ("(1, 2)", "(2, 1)", False),
    (r"\{1, 2\}", r"\{2, 1\}", True),
    ("1, 2", "2、1", True),
    ("1, 2", "2", False),
    (r"(-\infty, 3]", "(-∞, 3]", True),
    (r"\frac{\pi}{2}", r"\pi/2", True),
    (r"\text{Friday}", "friday", True),
    (r"\text{Friday}", "Monday", False),
    (r"\sqrt{2}", r"\sqrt{3} or \sqrt{2}", False),
    (r"\sqrt{2}", r"\sqrt{3}} or {\sqrt{2}", False),
    (r"\sqrt{2}", r"\sqrt{3}$ $\sqrt{2}", False),
    (r"\sqrt{2}", r"\(\sqrt{3}\) \(\sqrt{2}\)", False),
    (r"\sqrt{2}", r"\sqrt{3}, \sqrt{2}", False),
    (r"\sqrt{2}", "__import__('os').system('true')", False),
    (r"\sqrt{2}", "\x00", False),
    (r"\sqrt{2}", "\ud800", False),
    (r"\sqrt{2}", r"\frac{1}{0}", False),
]


@pytest.mark.parametrize(("gold", "text", "right"), FORMULAS)
def test_formulas_are_judged_by_math_verify(gold, text, right):
    pytest.importorskip("math_verify")
    assert verify(problem(gold), text) is right


BOMBS = ["9^{9^{9^9}}", "(" * 400 + "1" + ")" * 400, "99999999!", r"\sum_{k=1}^{10^{12}} \sqrt{k}", "{" * 90 + "}" * 90]


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_wrong_within_the_limit_and_the_next_answer_is_judged(bomb):
    pytest.importorskip("math_verify")
    comparer = Comparer(limit=2.0)
    assert comparer.equivalent(r"\sqrt{8}", r"2\sqrt{2}")
    started = time.monotonic()
    assert not comparer.equivalent(r"\sqrt{2}", bomb)
    assert time.monotonic() - started < 4
    assert comparer.equivalent(r"\sqrt{8}", r"2\sqrt{2}")
    comparer.close()


def test_threads_take_turns_at_one_process():
    pytest.importorskip("math_verify")
    comparer = Comparer(limit=20.0)

    def ask(number):
        assert threading.current_thread() is not threading.main_thread()
        return comparer.equivalent(rf"\sqrt{{{number}}}", rf"\frac{{\sqrt{{{4 * number}}}}}{{{2 + number % 2}}}")

    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(ask, range(2, 22)))
    assert verdicts == [number % 2 == 0 for number in range(2, 22)]
    comparer.close()


def test_a_worker_ends_with_its_caller():
    pytest.importorskip("math_verify")
    program = (
        "import os, signal\n"
        "from stages.problems.symbolic import Comparer\n"
        "comparer = Comparer()\n"
        "assert comparer.equivalent('x+x', '2x')\n"
        "print(comparer._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join(folder for folder in sys.path if folder)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    worker = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {worker} outlives its caller")


def test_without_math_verify_a_formula_is_refused_when_problems_are_selected(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    require([problem("3/4"), problem(r"50\%")])
    with pytest.raises(ConfigError, match=r"pip install 'fathom-line\[math\]'"):
        ProblemFilter().select([problem("7"), problem(r"\sqrt{2}")])


def test_equal_numbers_are_one_ballot():
    asked = problem("3/4")
    votes = {ballot(asked, text) for text in ("0.75", r"\boxed{\frac{3}{4}}", r"so \boxed{6/8}", "x = 3/4")}
    assert len(votes) == 1
    assert ballot(asked, "0.7") not in votes
    assert ballot(problem("50"), r"50\%") != ballot(problem("50"), "0.5")  # only one of them may mean 50
    assert ballot(asked, "no idea") == "no idea"


@given(st.text(max_size=300) | st.text(alphabet=r"\boxed{}frac0123456789,./%$ -()", max_size=60))
@settings(deadline=None, max_examples=300)
def test_any_text_is_right_or_wrong_and_votes(text):
    asked = problem("3/4")
    assert verify(asked, text) in (True, False)
    assert isinstance(ballot(asked, text), str)
    assert boxed("3/4", {"value": text}) in (True, False) if readings(tidy(text)) else True
