"""Reward for code: the share of tests that a program passes, each failure with its reason.

The expected answers stay in this process. The child gets the program, the inputs and nothing else, so there is nothing
for it to read, and what it prints is compared here: text with text, or JSON values with JSON values, so that no object
of its making (an `__eq__` that says yes) takes part in the comparison.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from infra.sandbox import CodeRunner, Limits, Outcome

MARK = "\x1e"  # ASCII's record separator begins a line that answers a call


@dataclasses.dataclass(frozen=True)
class InputTest:
    """The program, given `stdin`, prints `stdout`; spaces at the ends of lines and empty lines at the end are free."""

    stdin: str
    stdout: str


@dataclasses.dataclass(frozen=True)
class CallTest:
    """`function(*arguments)` returns `value`. Both are JSON; a tuple counts as a list, floats are right to 1e-9.

    Arguments that JSON cannot tell, such as tuples, are given as the text of a Python literal: "((1, 2), {3})".
    """

    function: str
    arguments: Sequence[Any] | str
    value: Any


@dataclasses.dataclass(frozen=True)
class CodeScore:
    """`score` in [0, 1]; `reasons`: why each test failed, "" where it passed."""

    score: float
    reasons: tuple[str, ...]


def code_reward(
    program: str,
    tests: Sequence[InputTest] | Sequence[CallTest],
    runner: CodeRunner,
    limits: Limits | None = None,
    all_or_nothing: bool = True,
) -> CodeScore:
    """Run `program` on `tests`, a process for each input or one for all calls, whose limits `limits` are.

    `all_or_nothing`: 1 if every test passes, and no further input is tried after a failure; else the share that passes.
    """
    assert tests
    calls = [test for test in tests if isinstance(test, CallTest)]
    if calls:
        assert len(calls) == len(tests), "inputs and calls are tested apart"
        outcome = runner.run(with_calls(program, calls), limits=limits)
        reasons = [check_call(outcome, index, test.value) for index, test in enumerate(calls)]
    else:
        reasons = []
        for test in tests:
            assert isinstance(test, InputTest)
            skip = all_or_nothing and any(reasons)
            reasons.append("not run: an earlier test failed" if skip else check_input(runner, program, test, limits))
    passed = sum(not reason for reason in reasons)
    return CodeScore(float(passed == len(tests)) if all_or_nothing else passed / len(tests), tuple(reasons))


def check_input(runner: CodeRunner, program: str, test: InputTest, limits: Limits | None = None) -> str:
    """Why the program fails this test, or ""."""
    outcome = runner.run(program, test.stdin, limits)
    if outcome.kind != "ok":
        return f"{outcome.kind}: {outcome.reason}"
    return "" if _lines(outcome.stdout) == _lines(test.stdout) else "wrong output"


def with_calls(program: str, calls: Sequence[CallTest]) -> str:
    """The program followed by its calls, each of which prints a line: the mark, its index, and a value or an error."""
    lines = [program, "import json as _json"]
    for index, call in enumerate(calls):
        assert call.function.isidentifier()
        literal = isinstance(call.arguments, str)
        given = call.arguments if literal else f"_json.loads({json.dumps(list(call.arguments))!r})"
        lines += [
            "try:",
            f"    _value = _json.dumps({call.function}(*{given}))",
            f"    print('\\n{MARK}{index} =', _value, flush=True)",
            "except Exception as _error:",
            f"    print('\\n{MARK}{index} !', type(_error).__name__ + ':', _error, flush=True)",
        ]
    return "\n".join(lines) + "\n"


def check_call(outcome: Outcome, index: int, value: Any) -> str:
    """Why call number `index` fails, or "". A call that is answered twice is a guess."""
    answers = [line for line in outcome.stdout.split("\n") if line.startswith(f"{MARK}{index} ")]
    if not answers:
        return f"{outcome.kind}: {outcome.reason}" if outcome.kind != "ok" else "ended without an answer"
    if len(answers) > 1:
        return "answered more than once"
    sign, _, text = answers[0].partition(" ")[2].partition(" ")
    if sign != "=":
        return f"error: {text[:300]}"
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return "answered with no value"
    return "" if same(given, json.loads(json.dumps(value))) else "wrong value"


def same(given: Any, value: Any) -> bool:
    """Equality of JSON values: true is not 1, and numbers may differ by rounding."""
    if isinstance(given, bool) or isinstance(value, bool):
        return given is value
    if isinstance(given, int) and isinstance(value, int):
        return given == value
    if isinstance(given, int | float) and isinstance(value, int | float):
        return abs(given) < 1e300 and math.isclose(given, value, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(given, list) and isinstance(value, list):
        return len(given) == len(value) and all(same(g, v) for g, v in zip(given, value, strict=True))
    if isinstance(given, dict) and isinstance(value, dict):
        return given.keys() == value.keys() and all(same(given[key], value[key]) for key in value)
    return type(given) is type(value) and given == value


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
