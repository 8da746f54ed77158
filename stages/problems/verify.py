"""Verifiers: is this text a right answer? Total functions: any string gives True or False, never an error.

An answer must *be* the answer. Nothing is searched inside longer text ("the answer is 4" is wrong), because a verifier
that rewards containment is a verifier that reinforcement learning will find.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from stages.problems.boxed import boxed, cut, readings, tidy
from stages.problems.expression import SAME_SIGN, ExpressionError, evaluate
from stages.problems.problem import Problem

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
    return [part for part in re.split(r"[ ,，、]+", text.lower()) if part] == arguments["values"]


VERIFIERS: Mapping[str, Callable[[str, Mapping[str, Any]], bool]] = {
    check.__name__: check for check in (integer, integers, digits, countdown, roles, boxed)
}


def verify(problem: Problem, text: str) -> bool:
    """Whether `text`, the whole content of `<answer>`, answers `problem`. Surrounding spaces are forgiven."""
    answer = _answer(problem, text)
    return len(answer) <= MAX_ANSWER and VERIFIERS[problem.verifier](_plain(answer), problem.arguments)


def ballot(problem: Problem, text: str) -> str:
    """What an answer votes for in a consensus, the same for answers that say the same. It never looks at the right one.

    Two expressions say the same if they are worth the same and use the same numbers; two numbers in any spelling, if
    they are equal; two formulas, if they are written alike.
    """
    plain = _plain(_answer(problem, text)[:MAX_ANSWER])
    if problem.verifier == "countdown":
        try:
            result = evaluate(plain)
        except ExpressionError:
            return plain
        return f"{result.value} from {sorted(result.numbers)}"
    if problem.verifier == "boxed":
        return str(min(readings(tidy(plain)), default=tidy(plain)))
    return re.sub(r"[ ,，、]+", " ", plain.lower())


def _answer(problem: Problem, text: str) -> str:
    """What of the text is judged: all of it, unless the answer is to stand in a box."""
    return cut(text) if problem.verifier == "boxed" else text


def _plain(text: str) -> str:
    return text.strip(" ").translate(SAME_SIGN)
