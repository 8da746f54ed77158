"""Verifiers: is this text a right answer? Total functions: any string gives a verdict, never an error.

An answer must *be* the answer. Nothing is searched inside longer text ("the answer is 4" is wrong), because a verifier
that rewards containment is a verifier that reinforcement learning will find. Programs are the exception that proves
it: prose around a ```python block is not run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from stages.problems import boxed as formulas
from stages.problems import gym
from stages.problems.boxed import boxed, cut, readings, tidy
from stages.problems.expression import SAME_SIGN, ExpressionError, evaluate
from stages.problems.problem import Problem
from stages.problems.programs import code, program_of, run_tests, runner

MAX_ANSWER = 200  # characters; longer text is not an answer to any of our questions


def integer(text: str, arguments: Mapping[str, Any]) -> bool:
    """Exactly the integer `arguments["value"]`, without leading zeros or a plus sign."""
    return re.fullmatch(r"0|-?[1-9][0-9]{0,17}", text) is not None and int(text) == arguments["value"]


def integers(text: str, arguments: Mapping[str, Any]) -> bool:
    """Exactly the integers `arguments["values"]` in this order, separated by spaces, commas or both."""
    parts = re.split(r"[ ,，、]+", text)
    values = arguments["values"]
    return len(parts) == len(values) and all(integer(p, {"value": v}) for p, v in zip(parts, values, strict=True))


def digits(text: str, arguments: Mapping[str, Any]) -> bool:
    """Exactly this run of digits; leading zeros count."""
    return text == arguments["value"]


def countdown(text: str, arguments: Mapping[str, Any]) -> bool:
    """An expression that uses each of `arguments["numbers"]` once and is worth exactly `arguments["target"]`."""
    try:
        result = evaluate(text)
    except ExpressionError:
        return False
    return sorted(result.numbers) == sorted(arguments["numbers"]) and result.value == arguments["target"]


def roles(text: str, arguments: Mapping[str, Any]) -> bool:
    """One word for each person, in the order asked: `arguments["values"]`."""
    return _words(text) == arguments["values"]


VERIFIERS: Mapping[str, Callable[[str, Mapping[str, Any]], bool]] = {
    check.__name__: check
    for check in (integer, integers, digits, countdown, roles, boxed, code, gym.text, gym.reasoning_gym)
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`share`: of a program's tests that it passes, 1 or 0 for any other answer. `reason`: why it is wrong, else ""."""

    right: bool
    share: float
    reason: str


def judge(problem: Problem, text: str, every_test: bool = False) -> Verdict:
    """What `text`, the whole content of `<answer>`, is worth as an answer to `problem`, white space around it aside.

    `every_test` goes on after a program's first failure: only then is `share` more than all or nothing.
    """
    if problem.verifier == "code":
        score = run_tests(text, problem.arguments, all_or_nothing=not every_test)
        return Verdict(score.score == 1, score.score, next((reason for reason in score.reasons if reason), ""))
    answer = _answer(problem, text)
    if len(answer) > MAX_ANSWER:
        return Verdict(False, 0.0, f"longer than {MAX_ANSWER} characters")
    right = VERIFIERS[problem.verifier](answer, problem.arguments)
    return Verdict(right, float(right), "" if right else "wrong answer")


def verify(problem: Problem, text: str) -> bool:
    """Whether `text` answers `problem`, as `judge` says."""
    return judge(problem, text).right


def require(problems: Iterable[Problem]) -> None:
    """Raise `ConfigError` if a problem needs what does not work here: math-verify, reasoning-gym or a sandbox."""
    problems = tuple(problems)
    formulas.require(problems)
    verifiers = {problem.verifier for problem in problems}
    if "code" in verifiers:
        runner()
    if "reasoning_gym" in verifiers:
        gym.require()


ROLES = ("knight", "knave", "骑士", "骗子")


def readable(problem: Problem, text: str) -> bool:
    """Whether `text` has the form of an answer to `problem`, right or wrong: what Logic-RL calls parseable."""
    answer = _answer(problem, text)
    if not answer or (len(answer) > MAX_ANSWER and problem.verifier != "code"):
        return False
    parts = _words(answer)
    match problem.verifier:
        case "roles":
            return len(parts) == len(problem.arguments["values"]) and all(part in ROLES for part in parts)
        case "integer" | "digits":
            return re.fullmatch(r"-?[0-9]+", answer) is not None
        case "integers":
            return all(re.fullmatch(r"-?[0-9]+", part) for part in parts)
        case "countdown":
            try:
                evaluate(answer)
            except ExpressionError:
                return False
    return True


def ballot(problem: Problem, text: str) -> str:
    """What an answer votes for in a consensus, the same for answers that say the same. It never looks at the right one.

    Two expressions say the same if they are worth the same and use the same numbers; two numbers in any spelling, if
    they are equal (50 % may mean two, and is a vote of its own); two formulas, if they are written alike.
    """
    if problem.verifier == "code":  # programs that are written alike but for spaces at the ends of lines
        return "\n".join(line.rstrip() for line in program_of(text).split("\n"))
    answer = _answer(problem, text)
    if len(answer) > MAX_ANSWER:  # wrong, so it shares no vote with what may be right
        return answer
    if problem.verifier == "countdown":
        try:
            result = evaluate(answer)
        except ExpressionError:
            return answer
        return f"{result.value} from {sorted(result.numbers)}"
    if problem.verifier == "boxed":
        return " or ".join(map(str, sorted(readings(tidy(answer))))) or tidy(answer)
    if problem.verifier in ("text", "reasoning_gym"):  # judged by the letter
        return re.sub(r"[ \t]+(?=\n|$)", "", answer)
    if problem.verifier == "roles":
        return " ".join(_words(answer))
    return re.sub(r"[ ,，、]+", " ", answer.lower())


def _words(text: str) -> list[str]:
    return [part for part in re.split(r"[ ,，、]+", text.lower()) if part]


def _answer(problem: Problem, text: str) -> str:
    """What of the text is judged: all of it, unless the answer is to stand in a box; without the space around it, its
    signs and digits in ASCII."""
    return (cut(text) if problem.verifier == "boxed" else text).strip().translate(SAME_SIGN)
