"""Knights and knaves with two to seven people, as Logic-RL asks them (Xie et al. 2025; puzzles of Xie et al. 2024, On
Memorization of Large Language Models in Logical Reasoning): each says one thing about others, joined by and, or, if,
exactly when. A knight's claim is true and a knave's is false; exactly one set of roles fits.

The chain assumes roles person by person, goes back at the first claim that does not fit, and ends at the one set that
does: what a model would have to think aloud, and no table of all sets.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from stages.problems.family import Family, Numbers, Written
from stages.problems.knights_and_knaves import ROLE
from stages.problems.problem import Language


class Claim(NamedTuple):
    """`join` of "X is a knight (knave)" and the same of Y; for `is` both are the same."""

    join: str
    first: tuple[int, bool]
    second: tuple[int, bool]


JOINS: dict[str, Callable[[bool, bool], bool]] = {
    "is": lambda a, b: a,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "if": lambda a, b: not a or b,
    "iff": lambda a, b: a == b,
}
SAYS = {
    "en": {
        "is": "{}",
        "and": "{} and {}",
        "or": "{} or {}",
        "if": "if {} then {}",
        "iff": "{} if and only if {}",
    },
    "zh": {"is": "{}", "and": "{}并且{}", "or": "{}或者{}", "if": "如果{}那么{}", "iff": "{}当且仅当{}"},
}
NAMES = {
    "en": ("Amy", "Bob", "Eve", "Tom", "Sam", "Zoe", "Max", "Ida", "Leo", "Ann"),
    "zh": ("小明", "小红", "小刚", "小丽", "小华", "小美", "小强", "小云", "小军", "小兰"),
}
MOST_LINES = 24  # of a chain; puzzles that need more are drawn again

Roles = Sequence[bool]


def holds(claim: Claim, roles: Roles) -> bool:
    first, second = (roles[person] == knight for person, knight in (claim.first, claim.second))
    return JOINS[claim.join](first, second)


def fits(claims: Sequence[Claim], roles: Roles) -> bool:
    """Whether each claim is true exactly when its speaker is a knight."""
    return all(holds(claim, roles) == role for claim, role in zip(claims, roles, strict=True))


def solutions(claims: Sequence[Claim]) -> list[tuple[bool, ...]]:
    return [roles for roles in itertools.product((True, False), repeat=len(claims)) if fits(claims, roles)]


def search(claims: Sequence[Claim]) -> list[tuple[tuple[bool, ...], int | None]]:
    """(roles assumed, the speaker whose claim does not fit them or None) in the order of thought, the solution last."""
    tried: list[tuple[tuple[bool, ...], int | None]] = []

    def go_on(roles: tuple[bool, ...]) -> bool:
        known = set(range(len(roles)))
        for speaker, claim in enumerate(claims):
            if {claim.first[0], claim.second[0], speaker} <= known and holds(claim, roles) != roles[speaker]:
                tried.append((roles, speaker))
                return False
        if len(roles) == len(claims):
            tried.append((roles, None))
            return True
        return go_on((*roles, True)) or go_on((*roles, False))

    go_on(())
    return tried


def draw(rng: Random, level: int) -> Numbers:
    people = level + 1
    while True:
        claims = []
        for speaker in range(people):
            others = [person for person in range(people) if person != speaker]
            # Two people have one other to talk of, so the second part may be of the speaker.
            about = rng.sample(others, 2) if people > 2 else [others[0], speaker]
            first, second = ((person, rng.random() < 0.5) for person in about)
            join = rng.choice(sorted(JOINS))
            claims.append(Claim(join, first, first if join == "is" else second))
        if len(solutions(claims)) == 1 and len(search(claims)) <= MOST_LINES:
            return {"claims": claims, "names": rng.sample(range(len(NAMES["en"])), people)}


def write(numbers: Numbers, language: Language, rng: Random) -> Written:
    names = [NAMES[language][number] for number in numbers["names"]]
    claims, role = numbers["claims"], ROLE[language]

    def of(person: int, knight: bool) -> str:
        return f"{names[person]} is a {role[knight]}" if language == "en" else f"{names[person]}是{role[knight]}"

    said = [SAYS[language][claim.join].format(of(*claim.first), of(*claim.second)) for claim in claims]
    lines, before = [], ()
    for roles, wrong in search(claims):
        # A line says what changes: who stands before the first change keeps the role.
        same = next((n for n, pair in enumerate(zip(roles, before, strict=False)) if pair[0] != pair[1]), 0)
        assumed = " ".join(f"{names[n]} {role[knight]}" for n, knight in enumerate(roles) if n >= same)
        before = roles
        if language == "zh":
            lines.append(assumed + ("：都对" if wrong is None else f"：{names[wrong]}的话不对"))
        else:
            lines.append(assumed + (": all fit" if wrong is None else f": what {names[wrong]} says does not fit"))
    answer = " ".join(role[knight] for knight in search(claims)[-1][0])
    if language == "en":
        told = " ".join(f"{name} says: {claim}." for name, claim in zip(names, said, strict=True))
        question = f"Knights tell the truth, knaves lie. {told} Who is what? Answer in this order: {', '.join(names)}."
        return Written(question, "; ".join(lines), answer, {"values": answer.split()})
    told = "".join(f"{name}说：{claim}。" for name, claim in zip(names, said, strict=True))
    question = f"骑士说真话，骗子说假话。{told}谁是什么？按此顺序回答：{'、'.join(names)}。"
    return Written(question, "；".join(lines), answer, {"values": answer.split()})


def content(numbers: Numbers) -> str:
    """The claims without the names."""
    return "/".join(
        f"{claim.join}{claim.first[0]}{claim.first[1]:d}"
        + ("" if claim.join == "is" else f"{claim.second[0]}{claim.second[1]:d}")
        for claim in numbers["claims"]
    )


ISLANDERS = Family("islanders", "roles", 6, draw, write, content)
