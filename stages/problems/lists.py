"""Problems about order: which of two numbers is larger, sorting a few, reading digits backwards."""

from __future__ import annotations

from random import Random

from stages.problems.family import Family, Numbers, Written
from stages.problems.problem import Language

COMPARE_LEVELS = {1: 99, 2: 999, 3: 99_999}  # level -> largest number
SORT_LEVELS = {1: (3, 9), 2: (3, 99), 3: (4, 99), 4: (5, 99)}  # level -> (how many, largest)
REVERSE_LEVELS = {1: (3, 4), 2: (4, 5), 3: (5, 6), 4: (6, 8)}  # level -> (fewest digits, most)


def draw_compare(rng: Random, level: int) -> Numbers:
    return {"values": rng.sample(range(1, COMPARE_LEVELS[level] + 1), 2)}


def write_compare(numbers: Numbers, language: Language, rng: Random) -> Written:
    left, right = numbers["values"]
    question = f"Larger of {left} and {right}?" if language == "en" else f"{left}和{right}哪个大？"
    sign = ">" if left > right else "<"
    chain = (
        f"{left} {sign} {right}, so {max(left, right)}"
        if language == "en"
        else f"{left}{sign}{right}，所以{max(left, right)}"
    )
    return Written(question, chain, str(max(left, right)), {"value": max(left, right)})


def draw_sort(rng: Random, level: int) -> Numbers:
    count, largest = SORT_LEVELS[level]
    return {"values": rng.sample(range(1, largest + 1), count)}


def write_sort(numbers: Numbers, language: Language, rng: Random) -> Written:
    values, ordered = numbers["values"], sorted(numbers["values"])
    shown = " ".join(map(str, values))
    question = f"Sort {shown}." if language == "en" else f"从小到大排{shown}。"
    least, then, comma = ("least ", "then ", ", ") if language == "en" else ("最小", "然后", "，")
    chain = comma.join((then if position else least) + str(value) for position, value in enumerate(ordered))
    return Written(question, chain, " ".join(map(str, ordered)), {"values": ordered})


def draw_reverse(rng: Random, level: int) -> Numbers:
    fewest, most = REVERSE_LEVELS[level]
    return {"digits": "".join(rng.choice("0123456789") for _ in range(rng.randint(fewest, most)))}


def write_reverse(numbers: Numbers, language: Language, rng: Random) -> Written:
    digits = numbers["digits"]
    backwards = digits[::-1]
    question = f"Reverse {digits}." if language == "en" else f"把{digits}倒过来。"
    last, then, comma = ("last ", "then ", ", ") if language == "en" else ("末位", "再", "，")
    chain = comma.join((then if position else last) + digit for position, digit in enumerate(backwards))
    return Written(question, chain, backwards, {"value": backwards})


COMPARE = Family(
    "compare",
    "integer",
    len(COMPARE_LEVELS),
    draw_compare,
    write_compare,
    lambda n: ",".join(map(str, sorted(n["values"]))),
)
SORT = Family(
    "sort", "integers", len(SORT_LEVELS), draw_sort, write_sort, lambda n: ",".join(map(str, sorted(n["values"])))
)
REVERSE = Family("reverse", "digits", len(REVERSE_LEVELS), draw_reverse, write_reverse, lambda n: n["digits"])
