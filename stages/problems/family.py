"""A family: how to draw the numbers of a problem at a level, and how to write it in either language."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

from stages.problems.problem import Language

Numbers = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Written:
    question: str
    chain: str
    answer: str
    arguments: Numbers  # what the verifier needs


@dataclasses.dataclass(frozen=True)
class Family:
    """`draw(rng, level)` gives the numbers; `write(numbers, language, rng)` the words (rng picks among templates);
    `content(numbers)` the language-free key that decides the split. Levels run from 1 to `levels`."""

    name: str
    verifier: str
    levels: int
    draw: Callable[[Random, int], Numbers]
    write: Callable[[Numbers, Language, Random], Written]
    content: Callable[[Numbers], str]


def first_then(steps: list[str], language: Language) -> str:
    """Join steps with the language's own words: "first 17+25=42, then 42-8=34" / "先算17+25=42，再算42-8=34"."""
    first, then, comma = ("first ", "then ", ", ") if language == "en" else ("先算", "再算", "，")
    return comma.join((first if position == 0 else then) + step for position, step in enumerate(steps))
