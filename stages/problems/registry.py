"""All families by name, and `generate`: distinct problems, deterministic by seed, on one side of the split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Literal

from infra.errors import ConfigError
from stages.problems.arithmetic import CHAIN_SUM, GCD, WORD_SUM
from stages.problems.countdown import COUNTDOWN, COUNTDOWN_WIDE
from stages.problems.family import Family
from stages.problems.functions import FUNCTIONS
from stages.problems.islanders import ISLANDERS
from stages.problems.knights_and_knaves import KNIGHTS_AND_KNAVES
from stages.problems.lists import COMPARE, REVERSE, SORT
from stages.problems.problem import Language, Problem, Split, digest

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        *(CHAIN_SUM, WORD_SUM, GCD, COUNTDOWN, COMPARE, SORT, REVERSE, KNIGHTS_AND_KNAVES),
        *(COUNTDOWN_WIDE, ISLANDERS, FUNCTIONS),
    )
}
WITHOUT_SANDBOX = tuple(name for name, family in FAMILIES.items() if family.verifier != "code")
FamilyName = Literal[tuple(FAMILIES)]  # type: ignore[valid-type]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
PATIENCE = 5000  # draws in a row that give nothing new before we call a family exhausted


def generate(
    families: Sequence[str],
    languages: Sequence[Language],
    n: int,
    seed: int,
    split: Split,
    levels: Sequence[int] | None = None,
) -> list[Problem]:
    """`n` problems with distinct questions, spread evenly over families × languages × levels.

    `levels` filters each family's own levels (all of them when None). The same arguments always give the same list.
    Raises `ConfigError` for an unknown family, language or level, and when there are fewer than `n` distinct questions.
    """
    cells = [
        (family, language, level)
        for level in sorted(set(levels or range(1, 10)))
        for family in families
        for language in languages
        if level in range(1, _family(family).levels + 1)
    ]
    unknown = [language for language in languages if language not in LANGUAGES]
    if unknown:
        raise ConfigError(f"languages: {unknown[0]!r} is not one of {', '.join(LANGUAGES)}")
    if not cells:
        raise ConfigError(f"levels: none of {list(families)} has a level in {list(levels or [])}")
    seen: set[str] = set()
    streams = {cell: _distinct(*cell, seed=seed, split=split, seen=seen) for cell in cells}
    problems: list[Problem] = []
    for cell in itertools.cycle(cells):
        if len(problems) == n or not streams:
            break
        if cell in streams:
            problem = next(streams[cell], None)
            if problem is None:
                del streams[cell]  # exhausted: the others make up for it
            else:
                problems.append(problem)
    if len(problems) < n:
        raise ConfigError(
            f"n: {list(families)} at levels {levels or 'all'} have only {len(problems)} distinct {split} questions; "
            f"ask for fewer than {n}, or add families or levels"
        )
    return problems


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ConfigError(f"families: {name!r} is unknown; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _distinct(
    name: str, language: Language, level: int, *, seed: int, split: Split, seen: set[str]
) -> Iterator[Problem]:
    """Endless new problems of one cell; `seen` holds the questions of all cells (levels overlap)."""
    family = FAMILIES[name]
    rng = Random(f"{seed}/{name}/{language}/{level}/{split}")
    misses = 0
    while misses < PATIENCE:
        problem = make(family, language, level, rng)
        if problem.question in seen or problem.split != split:
            misses += 1
            continue
        misses = 0
        seen.add(problem.question)
        yield problem


def make(family: Family, language: Language, level: int, rng: Random) -> Problem:
    """One problem, whatever its split."""
    numbers = family.draw(rng, level)
    written = family.write(numbers, language, rng)
    return Problem(
        id=f"{family.name}-{language}-{digest(written.question):016x}",
        family=family.name,
        language=language,
        level=level,
        question=written.question,
        chain=written.chain,
        answer=written.answer,
        verifier=family.verifier,
        arguments=written.arguments,
        content=family.content(numbers),
    )
