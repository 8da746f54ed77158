"""Countdown: reach a target with every given number used once.

The chain thinks aloud: it tries expressions, computes each, says whether it hits, and stops at the first that does.
Tries that miss make a longer chain but a surer answer, which is what reinforcement learning can discover here: a
model that goes on trying beats one that answers at once.
"""

from __future__ import annotations

from random import Random

from stages.problems.family import Family, Numbers, Written
from stages.problems.problem import Language

# level -> (how many numbers, largest number, signs, most misses shown in a chain)
COUNTDOWN_LEVELS = {1: (3, 9, "+-", 2), 2: (3, 12, "+-", 2), 3: (3, 12, "+-*", 2), 4: (4, 12, "+-*", 2)}
LARGEST_TARGET = 150
# The wide game has the numbers of TinyZero's data set (three or four up to 99, division among the signs); no bound but
# LARGEST_TARGET on what is met on the way.
WIDE_LEVELS = {1: (3, 99, "+-*/", 2), 2: (4, 99, "+-*/", 2)}


def apply(left: int, sign: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]


def try_once(rng: Random, numbers: list[int], signs: str) -> tuple[str, list[str], int]:
    """A random left-to-right expression over `numbers`: (expression, its steps, its value); never below zero or broken.

    Divisions leave no remainder.
    """
    order = rng.sample(numbers, len(numbers))
    expression, value, steps = str(order[0]), order[0], []
    for position, number in enumerate(order[1:]):
        possible = {
            "+": True,
            "-": value >= number,
            "*": value * number <= LARGEST_TARGET,
            "/": value % number == 0,
        }
        sign = rng.choice([sign for sign in signs if possible[sign]])
        # Left to right: a product after a sum needs parentheses around what came before.
        bracket = sign in "*/" and position > 0 and any(s in expression for s in "+-")
        expression = f"({expression}){sign}{number}" if bracket else f"{expression}{sign}{number}"
        result = apply(value, sign, number)
        steps.append(f"{value}{sign}{number}={result}")
        value = result
    return expression, steps, value


def draw(rng: Random, level: int) -> Numbers:
    return draw_from(rng, *COUNTDOWN_LEVELS[level])


def draw_wide(rng: Random, level: int) -> Numbers:
    return draw_from(rng, *WIDE_LEVELS[level])


def draw_from(rng: Random, count: int, largest: int, signs: str, misses: int) -> Numbers:
    numbers = [rng.randint(1, largest) for _ in range(count)]
    target = sum(numbers)
    while target == sum(numbers):  # adding everything up would answer a third of all questions without a thought
        *_, target = try_once(rng, numbers, signs)
    return {"numbers": numbers, "target": target, "signs": signs, "misses": misses}


def write(numbers: Numbers, language: Language, rng: Random) -> Written:
    given, target = numbers["numbers"], numbers["target"]
    shown = " ".join(map(str, given))
    question = f"Make {target} from {shown}." if language == "en" else f"用{shown}得到{target}。"
    miss, hit, comma, stop = (" no", " yes", ", ", "; ") if language == "en" else ("不对", "对了", "，", "；")
    misses_left, said = rng.randint(0, numbers["misses"]), []
    while True:  # ends: the target was drawn by the same try_once
        expression, steps, value = try_once(rng, given, numbers["signs"])
        if value != target and misses_left == 0:
            continue
        line = comma.join(steps) + (hit if value == target else miss)
        if line in said:
            continue
        said.append(line)
        if value == target:
            break
        misses_left -= 1
    return Written(question, stop.join(said), expression, {"numbers": given, "target": target})


def content(numbers: Numbers) -> str:
    return f"{sorted(numbers['numbers'])}->{numbers['target']}"


COUNTDOWN = Family("countdown", "countdown", len(COUNTDOWN_LEVELS), draw, write, content)
COUNTDOWN_WIDE = Family("countdown_wide", "countdown", len(WIDE_LEVELS), draw_wide, write, content)
