"""Knights and knaves: knights say only true things, knaves only false ones; each of two people says one thing.

Puzzles with exactly one solution, found by trying all four; the chain tries them aloud, as the countdown's does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from random import Random

from stages.problems.family import Family, Numbers, Written
from stages.problems.problem import Language

Claim = Callable[[bool, bool], bool]  # (speaker is a knight, the other is a knight) -> is the claim true
CLAIMS: Mapping[str, Claim] = {
    "other_knight": lambda me, other: other,
    "other_knave": lambda me, other: not other,
    "same": lambda me, other: me == other,
    "different": lambda me, other: me != other,
    "both_knaves": lambda me, other: not me and not other,
    "one_knave": lambda me, other: not (me and other),
    "one_knight": lambda me, other: me or other,
}
WORDS = {
    "en": {
        "other_knight": "{} is a knight",
        "other_knave": "{} is a knave",
        "same": "we are the same",
        "different": "we differ",
        "both_knaves": "we are both knaves",
        "one_knave": "at least one is a knave",
        "one_knight": "at least one is a knight",
    },
    "zh": {
        "other_knight": "{}是骑士",
        "other_knave": "{}是骗子",
        "same": "我们相同",
        "different": "我们不同",
        "both_knaves": "我们都是骗子",
        "one_knave": "至少一个骗子",
        "one_knight": "至少一个骑士",
    },
}
NAMES = {"en": ("Amy", "Bob", "Eve", "Tom", "Sam", "Zoe"), "zh": ("小明", "小红", "小刚", "小丽", "小华", "小美")}
ROLE = {"en": {True: "knight", False: "knave"}, "zh": {True: "骑士", False: "骗子"}}


def consistent(claims: tuple[str, str], first: bool, second: bool) -> bool:
    """Whether each speaker's claim is true exactly when the speaker is a knight."""
    return CLAIMS[claims[0]](first, second) == first and CLAIMS[claims[1]](second, first) == second


def solutions(claims: tuple[str, str]) -> list[tuple[bool, bool]]:
    return [pair for pair in itertools.product((True, False), repeat=2) if consistent(claims, *pair)]


def draw(rng: Random, level: int) -> Numbers:
    solvable = [pair for pair in itertools.product(CLAIMS, repeat=2) if len(solutions(pair)) == 1]
    return {"claims": rng.choice(solvable), "names": rng.sample(range(len(NAMES["en"])), 2)}


def write(numbers: Numbers, language: Language, rng: Random) -> Written:
    first, second = (NAMES[language][i] for i in numbers["names"])
    claims, words, role = numbers["claims"], WORDS[language], ROLE[language]
    said = (words[claims[0]].format(second), words[claims[1]].format(first))
    miss, hit = (" no", " yes") if language == "en" else ("不对", "对了")
    tried = []
    for pair in itertools.product((True, False), repeat=2):
        holds = consistent(claims, *pair)
        tried.append(" ".join(role[each] for each in pair) + (hit if holds else miss))
        if holds:
            break
    roles = [role[each] for each in pair]
    if language == "en":
        question, chain = f"Knight or knave? {first}: {said[0]}. {second}: {said[1]}.", "; ".join(tried)
    else:
        question, chain = f"骑士还是骗子？{first}：{said[0]}。{second}：{said[1]}。", "；".join(tried)
    return Written(question, chain, " ".join(roles), {"values": roles})


KNIGHTS_AND_KNAVES = Family("knights_and_knaves", "roles", 1, draw, write, lambda n: "/".join(sorted(n["claims"])))
