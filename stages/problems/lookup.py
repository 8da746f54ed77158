"""Lookups: a fact stated somewhere in a long text and asked for later, in English and Chinese.

The needle of "needle in a haystack" and the training text that teaches it are the same sentence pair: "Box 0417 holds
59302." and, further on, "What does box 0417 hold? Box 0417 holds ". A key and a value are held out by a hash of each,
so nothing that an evaluation asks about, and no answer, was ever planted in a training window.

A value's digits are encoded one by one whatever the tokenizer makes of runs of digits: then each is one token, uniform
over ten, and a model that cannot look back finds one in ten of them.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from stages.problems.problem import Language, Split, split_of
from stages.tokens.bpe import Tokenizer

DIGITS = "0123456789"
KEY_DIGITS, VALUE_DIGITS = 4, 5
STATEMENT = {"en": ("\nBox {} holds ", ".\n"), "zh": ("\n{}号箱里是", "。\n")}
QUESTION = {"en": "\nWhat does box {0} hold? Box {0} holds ", "zh": "\n{0}号箱里是什么？{0}号箱里是"}
SPACING = 256  # tokens of a training window for each lookup in it
NEAREST = 16  # tokens between a statement and its question, at least


@dataclasses.dataclass(frozen=True)
class Lookup:
    """One fact, both sides of it digits."""

    language: Language
    key: str
    value: str

    def statement(self, tokenizer: Tokenizer) -> list[int]:
        before, after = STATEMENT[self.language]
        return [*tokenizer.encode(before.format(self.key)), *self.answer(tokenizer), *tokenizer.encode(after)]

    def question(self, tokenizer: Tokenizer) -> list[int]:
        """What the answer follows at once."""
        return tokenizer.encode(QUESTION[self.language].format(self.key))

    def answer(self, tokenizer: Tokenizer) -> list[int]:
        return spell(self.value, tokenizer)


def spell(digits: str, tokenizer: Tokenizer) -> list[int]:
    """One token a digit."""
    ids = [token for digit in digits for token in tokenizer.encode(digit)]
    assert len(ids) == len(digits), (digits, ids)
    return ids


def draw(rng: np.random.Generator, language: Language, split: Split) -> Lookup:
    """A lookup of that side of the split."""
    return Lookup(language, _digits(rng, "key", KEY_DIGITS, split), _digits(rng, "value", VALUE_DIGITS, split))


def _digits(rng: np.random.Generator, role: str, n: int, split: Split) -> str:
    while True:
        digits = "".join(DIGITS[place] for place in rng.integers(0, 10, n))
        if split_of(f"lookup {role} {digits}") == split:
            return digits


def plant(tokens_T: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator) -> np.ndarray:
    """`tokens_T` with lookups of the train split in it, one for each SPACING tokens; the tail of the text gives way.

    A question follows its statement at a distance drawn evenly on a logarithmic scale, up to the whole window: near
    ones teach the skill, far ones the reach. Needs a window of `least_window` tokens.
    """
    lookups: dict[str, Lookup] = {}
    while len(lookups) < max(1, len(tokens_T) // SPACING):
        lookup = draw(rng, ("en", "zh")[int(rng.integers(2))], "train")
        lookups.setdefault(lookup.key, lookup)
    pairs = [
        (each.statement(tokenizer), each.question(tokenizer) + each.answer(tokenizer)) for each in lookups.values()
    ]
    room = len(tokens_T) - sum(len(statement) + len(question) for statement, question in pairs)
    assert room >= NEAREST, (len(tokens_T), room)
    pieces: list[tuple[int, list[int]]] = []  # (where in the text, what)
    for statement, question in pairs:
        distance = min(room, int(math.exp(rng.uniform(math.log(NEAREST), math.log(room + 1)))))
        place = int(rng.integers(0, room - distance + 1))
        pieces += [(place, statement), (place + distance, question)]
    planted, done = [], 0
    for place, ids in sorted(pieces, key=lambda piece: piece[0]):
        planted += [tokens_T[done:place], np.asarray(ids, tokens_T.dtype)]
        done = place
    return np.concatenate([*planted, tokens_T[done:room]])


def least_window(tokenizer: Tokenizer) -> int:
    """Tokens that a window needs for a lookup and some text around it."""
    longest = max(
        len(each.statement(tokenizer)) + len(each.question(tokenizer)) + VALUE_DIGITS
        for each in (Lookup(language, "0" * KEY_DIGITS, "0" * VALUE_DIGITS) for language in STATEMENT)
    )
    return longest + 2 * NEAREST
