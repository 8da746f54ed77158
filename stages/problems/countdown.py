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


def apply(left: int, sign: str, right: int) -> int:
    return left + right if sign == "+" else left - right if sign == "-" else left * right


def try_once(rng: Random, numbers: list[int], signs: str) -> tuple[str, list[str], int]:
    """A random left-to-right expression over `numbers`: (expression, its steps, its value); never below zero."""
    order = rng.sample(numbers, len(numbers))
    expression, value, steps = str(order[0]), order[0], []
    for position, number in enumerate(order[1:]):
        allowed = [s for s in signs if (s != "-" or value >= number) and (s != "*" or value * number <= LARGEST_TARGET)]
        sign = rng.choice(allowed)
        # Left to right: a product after a sum needs parentheses around what came before.
        bracket = sign == "*" and position > 0 and any(s in expression for s in "+-")
        expression = f"({expression}){sign}{number}" if bracket else f"{expression}{sign}{number}"
        result = apply(value, sign, number)
        steps.append(f"{value}{sign}{number}={result}")
        value = result
    return expression, steps, value


def draw(rng: Random, level: int) -> Numbers:
    count, largest, signs, misses = COUNTDOWN_LEVELS[level]
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


COUNTDOWN = Family(
    "countdown",
    "countdown",
    len(COUNTDOWN_LEVELS),
    draw,
    write,
    lambda numbers: f"{sorted(numbers['numbers'])}->{numbers['target']}",
)
