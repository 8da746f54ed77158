"""Code is paid for what it computes: right programs score, and every way to look right does not."""

from __future__ import annotations

import pytest

from infra.errors import ConfigError
from infra.sandbox import CodeRunner, Limits, Outcome, code_runner
from stages.rl.code_reward import CallTest, CodeScore, InputTest, code_reward, same

LIMITS = Limits(wall_seconds=5, cpu_seconds=1)
DOUBLE = [InputTest(f"{n}\n", f"{2 * n}\n") for n in (3, 50, 700)]
ADD = [CallTest("add", (n, m), n + m) for n, m in ((1111, 2222), (30303, 40404), (505050, 606060))]


@pytest.fixture(scope="module")
def runner() -> CodeRunner:
    try:
        return code_runner()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "program", ["print(2 * int(input()))", "import sys\nprint(sum(map(int, sys.stdin)) * 2, end='  \\n\\n')"]
)
def test_a_right_program_scores_one(runner: CodeRunner, program: str) -> None:
    assert code_reward(program, DOUBLE, runner, LIMITS) == CodeScore(1.0, ("", "", ""))


def test_a_right_function_scores_one_whatever_it_prints(runner: CodeRunner) -> None:
    program = "print('hello', end='')\ndef add(a, b):\n    print(a, end='')\n    return a + b"
    assert code_reward(program, ADD, runner, LIMITS) == CodeScore(1.0, ("", "", ""))


def test_arguments_that_json_cannot_tell_are_python_literals(runner: CodeRunner) -> None:
    program = "def f(a, b): return [type(a).__name__, sorted(b), a + (1,)]"
    tests = [CallTest("f", "((1, 2), {4, 3})", ["tuple", [3, 4], [1, 2, 1]])]
    assert code_reward(program, tests, runner, LIMITS) == CodeScore(1.0, ("",))


def test_a_program_that_is_right_in_part_scores_its_share_or_nothing(runner: CodeRunner) -> None:
    program = "n = int(input())\nprint(2 * n if n != 50 else 1 / 0)"
    wrong = "error: ZeroDivisionError: division by zero"
    assert code_reward(program, DOUBLE, runner, LIMITS, all_or_nothing=False) == CodeScore(2 / 3, ("", wrong, ""))
    skipped = "not run: an earlier test failed"
    assert code_reward(program, DOUBLE, runner, LIMITS) == CodeScore(0.0, ("", wrong, skipped))
    function = "def add(a, b): return a + b if a != 30303 else 1 / 0"
    assert code_reward(function, ADD, runner, LIMITS, all_or_nothing=False) == CodeScore(2 / 3, ("", wrong, ""))


def test_calls_answered_before_a_time_out_count(runner: CodeRunner) -> None:
    program = "def add(a, b):\n    while a == 505050: pass\n    return a + b"
    score = code_reward(program, ADD, runner, LIMITS, all_or_nothing=False)
    assert (score.score, score.reasons[:2]) == (2 / 3, ("", ""))
    assert score.reasons[2].startswith("timeout: ")


CHEATS = {  # program, its reason
    "equal to everything": (
        "class E(int):\n    def __eq__(s, o): return True\ndef add(a, b): return E(9)",
        "wrong value",
    ),
    "equal to everything, no number": (
        "class E:\n    def __eq__(s, o): return True\ndef add(a, b): return E()",
        "error: TypeError",
    ),
    "an early end": ("def add(a, b): return 0\nimport os\nos._exit(0)", "ended without an answer"),
    "an early end inside": ("import sys\ndef add(a, b): sys.exit(0)", "ended without an answer"),
    "every answer": (
        "for i in range(3):\n    for v in range(3): print(f'\\x1e{i} = {v}')\ndef add(a, b): return 0",
        "answered more than once",
    ),
    "an answer that swallows the calls": ("def add(a, b): return 0\nx = '''", "error: SyntaxError"),
    "a serialiser of its own": ("import json\njson.dumps = lambda v: 'true'\ndef add(a, b): return 0", "wrong value"),
    "nesting without end": ("def add(a, b):\n    x = []\n    x.append(x)\n    return x", "error: ValueError"),
    "not a number": ("def add(a, b): return float('nan')", "wrong value"),
    "infinite": ("def add(a, b): return float('inf')", "wrong value"),
    "nothing": ("", "error: NameError"),
    "its source read for the answers": (
        "import re\nnumbers = re.findall(r'\\d+', open(__file__).read())\n"
        "def add(a, b): return next((int(n) for n in numbers if int(n) == a + b), -1)",
        "wrong value",
    ),
    "expected values searched through frames": (
        "import gc, sys\ndef add(a, b):\n    f, seen = sys._getframe(), []\n"
        "    while f: seen += [*f.f_locals.values(), *f.f_globals.values()]; f = f.f_back\n"
        "    return next((v for v in seen + gc.get_objects() if isinstance(v, int) and v == a + b), -1)",
        "wrong value",
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_scores_nothing_and_is_told_why(runner: CodeRunner, name: str) -> None:
    program, reason = CHEATS[name]
    score = code_reward(program, ADD, runner, LIMITS, all_or_nothing=False)
    assert score.score == 0
    assert all(told.startswith(reason) for told in score.reasons), score


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("for n in range(2000): print(n)", "wrong output"),
        ("print(6)\nprint(6)", "wrong output"),
        ("", "wrong output"),
        ("print(2 * int(input()))\nraise SystemExit(1)", "error: exit status 1"),
        ("while True: print(6)", "output: wrote more than"),
        ("while True: pass", "timeout: "),
    ],
)
def test_output_must_be_the_whole_answer_of_a_program_that_ends_well(
    runner: CodeRunner, program: str, reason: str
) -> None:
    score = code_reward(program, DOUBLE[:1], runner, LIMITS)
    assert score.score == 0
    assert score.reasons[0].startswith(reason)


def test_expected_answers_never_leave_this_process() -> None:
    class Recorder:
        name = "recorder"
        given = ""

        def run(self, program: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
            self.given += program + stdin
            return Outcome("ok", "ended by itself")

        def obstacle(self) -> str | None:
            return None

    recorder = Recorder()
    code_reward("", [InputTest("1", "73577357")], recorder)
    code_reward("", [CallTest("f", (1,), "73577357")], recorder)
    assert "73577357" not in recorder.given


def test_values_are_the_same_only_if_their_types_are() -> None:
    assert same(1, 1.0) and same([1, {"a": 0.1 + 0.2}], [1, {"a": 0.3}]) and same(10**400, 10**400) and same(None, None)
    for given, value in ((True, 1), (1, True), ("1", 1), (None, False), ([1], 1), ({"a": 1}, {"b": 1}), ([1, 2], [1])):
        assert not same(given, value)
    assert not same(10**400, 1.5) and not same(10**18, 10**18 + 1) and not same(float("nan"), float("nan"))
