"""Answers that are programs: cut out of a reply and run, in a sandbox, on tests that the reply has not seen.

A problem's `arguments` are {"function": name, "calls": [[arguments, value], …]} for a function (arguments as a list, or
as the text of a Python literal), or {"inputs": [[stdin, stdout], …]} for a whole program; both may have {"limits": …},
the fields of `infra.sandbox.Limits`. What scores and how cheats fail is told in `stages.rl.code_reward`. Where no
sandbox works nothing runs, and the stage stops.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from infra.errors import ConfigError
from infra.sandbox import CodeRunner, Limits, code_runner
from stages.rl.code_reward import CallTest, CodeScore, InputTest, code_reward

FENCED = re.compile(
    r"^[ \t]*```(?:python3?|py)?[ \t]*\n(?P<code>.*?)(?:^|\n)[ \t]*```", re.DOTALL | re.IGNORECASE | re.MULTILINE
)
LIMITS = {"wall_seconds": 4.0, "cpu_seconds": 2}  # of one process, unless a problem says otherwise
MAX_PROGRAM = 20_000  # characters


def program_of(text: str) -> str:
    """The last ```python block of an answer, or all of an answer without one."""
    blocks = list(FENCED.finditer(text))
    return blocks[-1]["code"] if blocks else text.strip("\n")


def tests_of(arguments: Mapping[str, Any]) -> list[InputTest] | list[CallTest]:
    """The tests of a problem whose verifier is `code`."""
    if "calls" in arguments:
        return [CallTest(arguments["function"], given, value) for given, value in arguments["calls"]]
    return [InputTest(stdin, stdout) for stdin, stdout in arguments["inputs"]]


def run_tests(text: str, arguments: Mapping[str, Any], all_or_nothing: bool = True) -> CodeScore:
    """Score the program in `text`. ConfigError if no sandbox here can hold it."""
    tests, program = tests_of(arguments), program_of(text)
    if not program.strip() or len(program) > MAX_PROGRAM:
        return CodeScore(0.0, (f"no program of 1 to {MAX_PROGRAM} characters",) * len(tests))
    limits = Limits(**{**LIMITS, **arguments.get("limits", {})})
    score = code_reward(program, tests, runner(), limits, all_or_nothing)
    # Not the program's doing: it never ran. To score that as a failure would teach from noise.
    if refused := [reason for reason in score.reasons if reason.startswith("refused: ")]:
        raise ConfigError(f"sandbox: {runner().name} held programs before and does no longer ({refused[0]})")
    return score


def code(text: str, arguments: Mapping[str, Any]) -> bool:
    """A program that passes every test of `arguments`."""
    return run_tests(text, arguments).score == 1


def runner() -> CodeRunner:
    """This process's sandbox, the strongest that works here; ConfigError with what to mend where none does."""
    return _runner(os.getpid())


@cache
def _runner(pid: int) -> CodeRunner:
    return code_runner()
