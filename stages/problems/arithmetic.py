"""Sums told as formulas and as tiny stories, and greatest common divisors. Chains work one operation at a time."""

from __future__ import annotations

from random import Random

from stages.problems.family import Family, Numbers, Written, first_then
from stages.problems.problem import Language

# level -> (fewest terms, most terms, largest term)
SUM_LEVELS = {1: (2, 3, 9), 2: (3, 4, 9), 3: (2, 3, 49), 4: (2, 3, 99), 5: (4, 4, 99), 6: (3, 4, 999)}


def draw_sum(rng: Random, level: int) -> Numbers:
    """Signed terms whose running total never falls below zero."""
    fewest, most, largest = SUM_LEVELS[level]
    terms = [rng.randint(1, largest)]
    total = terms[0]
    for _ in range(rng.randint(fewest, most) - 1):
        term = rng.randint(1, largest)
        term = -term if term <= total and rng.random() < 0.5 else term
        terms.append(term)
        total += term
    return {"terms": terms}


def sum_steps(terms: list[int]) -> tuple[list[str], int]:
    """The running total as steps: [17, 25, -8] -> ["17+25=42", "42-8=34"], 34."""
    steps, total = [], terms[0]
    for term in terms[1:]:
        steps.append(f"{total}{term:+d}={total + term}")
        total += term
    return steps, total


def formula(numbers: Numbers) -> str:
    return str(numbers["terms"][0]) + "".join(f"{term:+d}" for term in numbers["terms"][1:])


def write_sum(numbers: Numbers, language: Language, rng: Random) -> Written:
    question = {"en": "Compute {}.", "zh": "计算{}。"}[language].format(formula(numbers))
    steps, total = sum_steps(numbers["terms"])
    return Written(question, first_then(steps, language), str(total), {"value": total})


THINGS = {"en": ("pens", "eggs", "books", "cards", "coins"), "zh": ("支笔", "个蛋", "本书", "张卡", "枚币")}
OWNERS = {"en": ("Tom", "Amy", "Bob", "Eve"), "zh": ("小明", "小红", "小刚", "小丽")}


def write_story(numbers: Numbers, language: Language, rng: Random) -> Written:
    owner, thing = rng.choice(OWNERS[language]), rng.choice(THINGS[language])
    first, *others = numbers["terms"]
    if language == "en":
        told = [f"{owner} has {first} {thing}"] + [f"gets {t}" if t > 0 else f"loses {-t}" for t in others]
        question = ", ".join(told) + ". How many now?"
    else:
        told = [f"{owner}有{first}{thing}"] + [f"得到{t}" if t > 0 else f"丢了{-t}" for t in others]
        question = "，".join(told) + "。现在有多少？"
    steps, total = sum_steps(numbers["terms"])
    return Written(question, first_then(steps, language), str(total), {"value": total})


GCD_LEVELS = {1: (6, 3), 2: (12, 8), 3: (30, 12)}  # level -> (largest divisor, largest cofactor)


def draw_gcd(rng: Random, level: int) -> Numbers:
    divisor, cofactor = GCD_LEVELS[level]
    shared = rng.randint(1, divisor)
    pair = [shared * rng.randint(1, cofactor), shared * rng.randint(1, cofactor)]
    return {"larger": max(pair), "smaller": min(pair)}


def write_gcd(numbers: Numbers, language: Language, rng: Random) -> Written:
    larger, smaller = numbers["larger"], numbers["smaller"]
    question = {"en": "GCD of {} and {}?", "zh": "{}和{}的最大公约数？"}[language].format(larger, smaller)
    steps = []
    while smaller:
        steps.append(f"{larger}%{smaller}={larger % smaller}")
        larger, smaller = smaller, larger % smaller
    return Written(question, first_then(steps, language), str(larger), {"value": larger})


CHAIN_SUM = Family("chain_sum", "integer", len(SUM_LEVELS), draw_sum, write_sum, formula)
WORD_SUM = Family("word_sum", "integer", len(SUM_LEVELS), draw_sum, write_story, formula)
GCD = Family(
    "gcd", "integer", len(GCD_LEVELS), draw_gcd, write_gcd, lambda numbers: f"{numbers['larger']},{numbers['smaller']}"
)
