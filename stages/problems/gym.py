"""Problems of reasoning-gym (optional package `reasoning-gym`), those of its families that can be trusted as rewards.

Its scorers pay for more than right answers: containment ("The answer is -4" earns 0.125), a space (0.5), any text at
all (game_of_life_halting), numbers that are off by one (number_sorting); some raise, some hand text to sympy, which is
`eval`. So families are named here one by one. Where a question has one answer it is compared as text, and judging needs
no reasoning-gym. SCORED families have several; their scorers were read, and 1.0 alone is right:
knights_knaves reads prose too, but an answer that gives somebody both roles is none.

Item i of seed s is drawn with s + i, so neighbouring seeds share all but one question, and "train on seed 1, evaluate
on seed 2" would evaluate on the training set. Here the split is a hash of the question, as everywhere in Fathom, so no
choice of seeds can leak.
"""

from __future__ import annotations

import importlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

from infra.config import Config, Field
from infra.errors import ConfigError
from stages.problems.expression import SAME_SIGN
from stages.problems.problem import Problem, Split, digest

ONE_ANSWER = (
    *("aiw", "arc_1d", "base_conversion", "basic_arithmetic", "binary_alternation", "caesar_cipher", "chain_sum"),
    *("count_bits", "count_primes", "course_schedule", "family_relationships", "gcd", "isomorphic_strings"),
    *("largest_island", "lcm", "leg_counting", "letter_counting", "maze", "mini_sudoku", "number_sequence", "products"),
    *("ransom_note", "rotate_matrix", "rotten_oranges", "simple_equations", "simple_geometry", "spell_backward"),
    *("string_manipulation", "string_splitting", "string_synthesis", "sudoku", "syllogism", "word_sequence_reversal"),
    "zebra_puzzles",
)
SCORED = ("knights_knaves", "shortest_path")
GymName = Literal[(*ONE_ANSWER, *SCORED)]  # type: ignore[valid-type]

ITEMS = 1 << 30  # of a dataset; the families above draw each when it is asked for
PATIENCE = 2000  # items in a row that give nothing new
LONGEST = 200  # characters of an answer, as in `stages.problems.verify`


class GymFamily(Config):
    """One family and its own settings, such as min_digits; reasoning-gym's documentation has them."""

    name: GymName = Field(title="Family")
    settings: dict[str, int | float | str | bool] = Field({}, title="Settings", description="The family's own options")


def generate_gym(families: Sequence[GymFamily], n: int, seed: int, split: Split) -> list[Problem]:
    """`n` problems with distinct questions, spread evenly over the families, whose questions are all English.

    Raises ConfigError without the package, for settings that a family refuses, and where there are too few questions.
    """
    seen: set[str] = set()
    streams = [_distinct(family, seed, split, seen) for family in families]
    problems = list(itertools.islice(_in_turn(streams), n))
    if len(problems) < n:
        names = [family.name for family in families]
        raise ConfigError(f"reasoning_gym: {names} have only {len(problems)} distinct {split} questions; ask for fewer")
    return problems


def _in_turn(streams: list[Iterator[Problem]]) -> Iterator[Problem]:
    while streams:
        for stream in list(streams):
            problem = next(stream, None)
            if problem is None:
                streams.remove(stream)
            else:
                yield problem


def _distinct(family: GymFamily, seed: int, split: Split, seen: set[str]) -> Iterator[Problem]:
    data = _dataset(family.name, json.dumps({"seed": seed, "size": ITEMS, **family.settings}, sort_keys=True))
    misses = 0
    for number in range(ITEMS):
        problem = _problem(family.name, data[number])
        if problem is None or problem.split != split or problem.content in seen:
            misses += 1
            if misses == PATIENCE:
                return
            continue
        misses = 0
        seen.add(problem.content)
        yield problem


def _problem(name: str, item: Mapping[str, Any]) -> Problem | None:
    """None for an item whose own answer is not judged right: an answer that is no solution, or too long."""
    question, answer = str(item["question"]).strip(), str(item["answer"]).strip()
    arguments: dict[str, Any] = {"value": answer}
    if name in SCORED:
        entry = {"question": question, "answer": answer, "metadata": item["metadata"]}
        arguments = {"family": name, "entry": json.loads(json.dumps(entry, default=str))}
    check = reasoning_gym if name in SCORED else text
    if len(answer) > LONGEST or not check(answer, arguments):
        return None
    content = f"{name} {' '.join(question.split())}"
    return Problem(
        id=f"gym_{name}-en-{digest(content):016x}",
        family=f"gym_{name}",
        language="en",
        level=1,
        question=question,
        chain="",
        answer=answer,
        verifier=check.__name__,
        arguments=arguments,
        content=content,
    )


def text(text: str, arguments: Mapping[str, Any]) -> bool:
    """Exactly the text `arguments["value"]`, but for spaces at the ends of lines and the width of signs and digits."""
    said, value = (
        re.sub(r"[ \t]+(?=\n|$)", "", each.strip().translate(SAME_SIGN)) for each in (text, arguments["value"])
    )
    return bool(said) and said == value


def reasoning_gym(text: str, arguments: Mapping[str, Any]) -> bool:
    """What the scorer of `arguments["family"]` gives 1.0 to. Whatever breaks it is not shown to be right."""
    if arguments["family"] not in SCORED:
        return False
    data = _dataset(arguments["family"], '{"seed": 0, "size": 1}')
    try:
        return data.score_answer(text.strip(), arguments["entry"]) == 1.0
    except Exception:
        return False


def require() -> None:
    """Raise ConfigError if reasoning-gym is not installed."""
    if find_spec("reasoning_gym") is None:
        raise ConfigError(
            "reasoning_gym: the package is not installed; pip install 'fathom-line[reasoning-gym]' (a C compiler is "
            "needed for one of its parts), or leave reasoning_gym empty"
        )


@cache
def _dataset(name: str, settings: str) -> Any:
    require()
    factory = importlib.import_module("reasoning_gym").create_dataset
    try:
        return factory(name, **json.loads(settings))
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"reasoning_gym.{name}: its settings are refused ({error})") from None
