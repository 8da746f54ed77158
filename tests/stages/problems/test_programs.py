"""Programs as answers: cut out of a reply, run on hidden tests in a sandbox, cheats paid nothing and told why."""

import itertools
from random import Random

import pyarrow.parquet as pq
import pytest

from infra.artifact import Artifact
from infra.errors import ConfigError
from infra.sandbox import Outcome, code_runner
from infra.stage import Context
from stages.evaluate import EvaluateConfig, evaluate
from stages.problems import programs
from stages.problems.functions import reference, told
from stages.problems.problem import Problem, write_problems
from stages.problems.programs import program_of
from stages.problems.registry import FAMILIES, LANGUAGES, make
from stages.problems.selection import ProblemFilter
from stages.problems.verify import ballot, judge, verify
from stages.rl.rewards import RewardWeights, accuracy_reward, score

FUNCTIONS = FAMILIES["functions"]
DOUBLE = Problem(
    *("d", "mine", "en", 1, "Print twice the number.", "", "print(2 * int(input()))", "code"),
    {"inputs": [["3\n", "6\n"], ["50\n", "100\n"]]},
    "d",
)
ADD = Problem(
    *("a", "mine", "en", 1, "Write add(a, b).", "", "def add(a, b): return a + b", "code"),
    {
        "function": "add",
        "calls": [[[1111, 2222], 3333], [[30303, 40404], 70707], [[505050, 606060], 1111110]],
        "limits": {"cpu_seconds": 1},
    },
    "a",
)


@pytest.fixture(scope="module")
def sandbox():
    try:
        return code_runner()
    except ConfigError as error:
        pytest.skip(str(error))


def reply(program: str) -> str:
    return f"<think>so</think><answer>{program}</answer>"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "x = 1"),
        ("\n    x = 1\n", "    x = 1"),
        ("```python\nx = 1\n```", "x = 1"),
        ("So:\n```py\nx = 1\ny = 2\n```\nwhich is right", "x = 1\ny = 2"),
        ("```\nx = 1\n```", "x = 1"),
        ("```python\nwrong\n```\nno:\n```python\nx = 1\n```", "x = 1"),
        ("```python\n```", ""),
        ("s = '```'", "s = '```'"),
        ("  ```python\n  x = 1\n  ```", "  x = 1"),
        ("a```\n" * 40_000, "a```\n" * 39_999 + "a```"),  # linear, or this test is not over today
        ("```python\n" + "\n" * 100_000, "```python"),
        ("", ""),
    ],
)
def test_the_program_is_the_last_block_or_all_of_the_answer(text, program):
    assert program_of(text) == program


def test_every_worked_function_passes_its_tests_and_a_wrong_one_does_not(sandbox):
    rng = Random(0)
    for language, level in itertools.product(LANGUAGES, range(1, FUNCTIONS.levels + 1)):
        for _ in range(3):
            problem = make(FUNCTIONS, language, level, rng)
            assert verify(problem, f"```python\n{problem.answer}\n```"), problem.answer
            verdict = judge(problem, problem.answer.replace("return ", "return 1 and None and "))
            assert (verdict.right, verdict.reason) == (False, "wrong value")
            assert len(problem.question) < 220
            assert len(problem.chain) < 240


def test_each_step_of_a_function_is_the_line_that_it_is_told_with():
    rng = Random(1)
    seen = set()
    for _ in range(400):
        numbers = FUNCTIONS.draw(rng, 3)
        seen |= {(numbers["kind"], step.line) for step, _ in told(numbers)}
        for given in numbers["given"]:
            value = given
            for step, k in told(numbers):
                value = eval(step.line.format(k=k), {"x": value})
            assert value == reference(numbers, given)
        assert len({str(reference(numbers, given)) for given in numbers["given"]}) >= 4
    assert len(seen) == 22  # every step of both kinds


def test_a_program_that_is_right_in_part_is_not_accurate_but_has_its_share(sandbox):
    text = reply("def add(a, b): return a + b if a < 400000 else 0")
    strict = score(ADD, text, True, RewardWeights())
    assert (strict.accuracy, strict.rules["tests"], strict.reason) == (0, 0, "wrong value")
    shared = score(ADD, text, True, RewardWeights(tests=1.0, format=0.25))
    assert (shared.accuracy, shared.rules["tests"]) == (0, pytest.approx(2 / 3))
    assert shared.reward == pytest.approx(2 / 3 + 0.25)


def test_programs_read_and_print(sandbox):
    assert judge(DOUBLE, "n = int(input())\nprint(n + n)").right
    half = judge(DOUBLE, "n = int(input())\nprint(n + 3)", every_test=True)
    assert (half.right, half.share, half.reason) == (False, 0.5, "wrong output")


def test_a_block_behind_the_chain_counts_where_there_is_no_answer_tag(sandbox):
    block = "```python\ndef add(a, b): return a + b\n```"
    assert accuracy_reward(ADD, f"<think>so</think>Here:\n{block}") == 1
    assert accuracy_reward(ADD, f"<think>{block}</think>done") == 0  # thought, not said
    assert accuracy_reward(ADD, f"<answer>{block}</answer><answer>{block}</answer>") == 0


CHEATS = {  # what a reply tries, and what it is told
    "writes the reward down": (
        "import json, pathlib\nfor p in ('/tmp/reward.json', '/tmp/reward.txt', 'reward.json'):\n"
        "    try: pathlib.Path(p).write_text('1.0')\n    except OSError: pass\n"
        "print('reward: 1.0')\ndef add(a, b): return None",
        "wrong value",
    ),
    "imports the judge": (
        "import sys\nsys.path += ['.', '..', '/']\nimport stages.rl.code_reward as judge\n"
        "judge.same = lambda *_: True\ndef add(a, b): return 0",
        "error: ModuleNotFoundError",
    ),
    "patches what it is called with": (
        "import builtins, json\nbuiltins.print = lambda *a, **k: None\njson.dumps = lambda v: '3333'\n"
        "def add(a, b): return 0",
        "ended without an answer",
    ),
    "is equal to everything": (
        "class E(int):\n    __eq__ = lambda s, o: True\ndef add(a, b): return E(9)",
        "wrong value",
    ),
    "ends before it is asked": ("import os\ndef add(a, b): return 0\nos._exit(0)", "ended without an answer"),
    "answers for itself": (
        "for i in range(3):\n    for v in (3333, 70707, 1111110): print(f'\\x1e{i} = {v}', flush=True)\n"
        "def add(a, b): return 0",
        "answered more than once",
    ),
    "asks the network": (
        "import socket\ndef add(a, b): return socket.create_connection(('127.0.0.1', 80), 1)",
        "error: ",
    ),
    "never ends": ("def add(a, b):\n    while True: pass", "timeout: "),
    "is no program": ("I think that a + b is right.", "error: SyntaxError"),
    "says nothing": ("", "no program"),
    "says too much": ("#" * 30_000 + "\ndef add(a, b): return a + b", "no program"),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_reply_that_cheats_earns_its_format_and_nothing_else(sandbox, name):
    program, reason = CHEATS[name]
    for text in (program, f"```python\n{program}\n```"):
        verdict = score(ADD, reply(text), True, RewardWeights(format=0.25, tests=1.0))
        assert verdict.reward == 0.25, verdict
        assert verdict.reason.startswith(reason), verdict.reason


@pytest.mark.parametrize(
    "text", ["</answer>", "<answer></answer>", "\x00", "\ud800", "```python\n\x00\n```", "é" * 5000]
)
def test_no_text_breaks_the_judge(sandbox, text):
    assert score(ADD, reply(text), True, RewardWeights()).accuracy == 0


def test_votes_are_for_programs_that_are_written_alike():
    assert ballot(ADD, "```python\nx = 1  \ny\n```") == ballot(ADD, "x = 1\ny") != ballot(ADD, "x = 2\ny")


def test_without_a_sandbox_nothing_is_run_and_the_message_is_the_sandboxes_own(monkeypatch):
    def none():
        raise ConfigError("sandbox: nothing here can hold a program that a model wrote")

    monkeypatch.setattr(programs, "code_runner", none)
    programs._runner.cache_clear()
    try:
        with pytest.raises(ConfigError, match="nothing here can hold a program"):
            ProblemFilter().select([ADD])
        with pytest.raises(ConfigError, match="nothing here can hold a program"):
            score(ADD, reply("def add(a, b): return a + b"), True, RewardWeights())
    finally:
        programs._runner.cache_clear()


def test_a_sandbox_that_fails_later_stops_the_run_and_is_not_scored(monkeypatch):
    class Broken:
        name = "broken"

        def run(self, program, stdin="", limits=None):
            return Outcome("refused", "the sandbox could not be built: no memory")

        def obstacle(self):
            return None

    monkeypatch.setattr(programs, "_runner", lambda pid: Broken())
    with pytest.raises(ConfigError, match=r"broken held programs before .*no memory"):
        verify(DOUBLE, "print(6)")


@pytest.fixture(scope="module")
def coder(tmp_path_factory, taught):
    """A checkpoint that answers "Pull 1." with a right function, "Pull 2." with an early end, "Pull 3." with prose."""
    said = {1: "def f(x): return x", 2: "exit(f) # says f x", 3: "f is the same as x"}  # of as many tokens
    pairs = [(f"Pull {number}.", program) for number, program in said.items()]
    return taught(tmp_path_factory.mktemp("coder"), pairs, steps=150)


def test_code_problems_go_through_a_whole_stage(coder, sandbox, tmp_path):
    tests = {"function": "f", "calls": [[[7], 7], [["a"], "a"]]}
    problems = [
        Problem(f"p{n}", "mine", "en", 1, f"Pull {n}.", "so", "def f(x): return x", "code", tests, str(n))
        for n in (1, 2, 3)
    ]
    (tmp_path / "problems").mkdir()
    write_problems(tmp_path / "problems" / "heldout.jsonl", problems)
    inputs = {
        "checkpoint": Artifact.local(coder, "checkpoint"),
        "problems": Artifact.local(tmp_path / "problems", "problems"),
    }
    config = EvaluateConfig(name="coder", samples=1, temperature=0.0, top_p=1.0, max_new_tokens=40)
    summary = evaluate(config, inputs, Context.local(tmp_path / "run"))
    rows = pq.read_table(tmp_path / "run" / "out" / "problems.parquet").to_pylist()
    assert {row["problem_id"]: row["pass_1"] for row in rows} == {"p1": 1.0, "p2": 0.0, "p3": 0.0}
    assert (summary["pass_1"], summary["format"]) == (0.3333, 1.0)
