"""Why a document is not worth a token: one pass over shared counts, and the name of the first rule that it breaks.

The rules follow Gopher (Rae et al. 2021, appendix A1.1) and C4 (Raffel et al. 2020, section 2.2). English thresholds
reject almost all Chinese (they count words between spaces), so Chinese has its own: lengths in characters, 。！？ at
the ends of sentences, Chinese stop words. Code has neither sentences nor stop words, and is judged by its lines.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from pydantic import Field

from infra.config import Config
from stages.corpus import languages
from stages.corpus.document import Document
from stages.corpus.shingles import SEPARATOR, Words, ngrams, words

_BULLET = re.compile(r"\s*(?:[-*•‣●○·–]|\d+[.)、])\s*\S")
_URL = re.compile(r"https?://\S+|www\.\S+")
_SPACE = re.compile(r"\s+")
_LETTERED = re.compile(r"(?<!\S)(?:(?=\S)[\W\d_])*+[^\W\d_]")  # a word up to its first letter; linear time
_ENGLISH_WORD = re.compile(r"[A-Za-z']+")
_ENDS = tuple(".!?:;。！？：；…”’\"')）】》`")
_PLACEHOLDER = re.compile(r"lorem ipsum|enable javascript|请启用javascript|请开启javascript", re.IGNORECASE)
_GENERATED = re.compile(r"auto[- ]?generated|do not edit|automatically generated", re.IGNORECASE)
STOP_WORDS_EN = frozenset(
    {"the", "be", "to", "of", "and", "that", "have", "with", "is", "a", "in", "for", "this", "are"}
)
STOP_WORDS_ZH = frozenset("的了是在有和不为与或及以对将可该到所")


class Limits(Config):
    """Thresholds of one language; None switches a rule off. Shares are between 0 and 1."""

    min_words: int = Field(20, ge=0, description="words; in Chinese, characters")
    max_words: int = Field(200_000, ge=1)
    min_mean_word: float | None = Field(None, description="mean characters a word between separators")
    max_mean_word: float | None = None
    max_symbols: float | None = Field(None, description="share of visible characters that are no letters or digits")
    max_bullet_lines: float | None = None
    max_ellipsis_lines: float | None = None
    min_alphabetic_words: float | None = Field(None, description="share of words with a letter")
    min_stop_words: int | None = Field(None, description="occurrences of the language's stop words")
    min_sentence_lines: float | None = Field(None, description="share of lines that end a sentence or a clause")
    max_duplicate_lines: float | None = Field(None, description="share of characters in lines that came before")
    max_duplicate_ngrams: float | None = Field(None, description="share of 5-word runs that came before")
    max_top_word: float | None = Field(None, description="share of the commonest word")
    max_urls: float | None = Field(None, description="share of characters in URLs")
    max_line: int | None = Field(None, description="characters of the longest line")
    refuse_generated: bool = Field(False, description="refuse code that says a program wrote it")


ENGLISH = Limits(
    min_mean_word=3,
    max_mean_word=12,
    max_symbols=0.35,
    max_bullet_lines=0.9,
    max_ellipsis_lines=0.3,
    min_alphabetic_words=0.7,
    min_stop_words=2,
    min_sentence_lines=0.1,
    max_duplicate_lines=0.3,
    max_duplicate_ngrams=0.5,
    max_top_word=0.3,
    max_urls=0.2,
)
CHINESE = ENGLISH.replace(
    min_mean_word=None,
    max_mean_word=None,
    min_alphabetic_words=None,
    min_stop_words=1,
    max_duplicate_ngrams=0.6,
    max_top_word=0.2,
)
CODE = Limits(
    max_symbols=0.6,
    max_duplicate_lines=0.5,
    max_duplicate_ngrams=0.7,
    max_top_word=0.5,
    max_line=1000,
    refuse_generated=True,
)


@dataclass(frozen=True)
class Counts:
    """What the rules ask about a text; each figure is worked out once, when a rule first needs it."""

    text: str
    language: str

    @cached_property
    def words(self) -> Words:
        return words(self.text)

    @cached_property
    def visible(self) -> int:
        return len(_SPACE.sub("", self.text))

    @cached_property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.split("\n") if line.strip()]

    def line_share(self, accept: Callable[[str], object]) -> float:
        return sum(1 for line in self.lines if accept(line)) / max(len(self.lines), 1)

    @property
    def symbols(self) -> float:
        letters = int((self.words.classes != SEPARATOR).sum())
        return 1 - min(letters / max(self.visible, 1), 1)

    @property
    def mean_word(self) -> float:
        spaced = self.text.split()
        return self.visible / max(len(spaced), 1)

    @property
    def alphabetic_words(self) -> float:
        return len(_LETTERED.findall(self.text)) / max(len(self.text.split()), 1)

    @property
    def stop_words(self) -> int:
        if self.language == "zh":
            return sum(self.text.count(word) for word in STOP_WORDS_ZH)
        return sum(1 for word in _ENGLISH_WORD.findall(self.text) if word.lower() in STOP_WORDS_EN)

    @property
    def duplicate_lines(self) -> float:
        repeated = sum((count - 1) * len(line) for line, count in Counter(self.lines).items())
        return repeated / max(sum(map(len, self.lines)), 1)

    @property
    def duplicate_ngrams(self) -> float:
        runs = ngrams(self.words.hashes)
        return 1 - len(np.unique(runs)) / max(len(runs), 1)

    @property
    def top_word(self) -> float:
        if not len(self.words):
            return 0.0
        return int(np.unique(self.words.hashes, return_counts=True)[1].max()) / len(self.words)

    @property
    def urls(self) -> float:
        return sum(map(len, _URL.findall(self.text))) / max(len(self.text), 1)


def _wrong_language(counts: Counts) -> bool:
    return counts.language != "code" and languages.identify(counts.text) != counts.language


def _above(value: float, limit: float | None) -> bool:
    return limit is not None and value > limit


def _below(value: float, limit: float | None) -> bool:
    return limit is not None and value < limit


# In the order they are asked: cheap and common first. The name is what a dropped document is counted under.
RULES: tuple[tuple[str, Callable[[Counts, Limits], bool]], ...] = (
    ("too_short", lambda c, at: len(c.words) < at.min_words),
    ("too_long", lambda c, at: len(c.words) > at.max_words),
    ("wrong_language", lambda c, at: _wrong_language(c)),
    ("broken_characters", lambda c, at: c.text.count("\ufffd") > 0.001 * len(c.text)),
    ("placeholder_text", lambda c, at: _PLACEHOLDER.search(c.text) is not None),
    ("generated_code", lambda c, at: at.refuse_generated and _GENERATED.search(c.text[:2000]) is not None),
    ("long_lines", lambda c, at: at.max_line is not None and max(map(len, c.lines), default=0) > at.max_line),
    ("urls", lambda c, at: _above(c.urls, at.max_urls)),
    ("symbols", lambda c, at: _above(c.symbols, at.max_symbols)),
    ("short_words", lambda c, at: _below(c.mean_word, at.min_mean_word)),
    ("long_words", lambda c, at: _above(c.mean_word, at.max_mean_word)),
    ("few_alphabetic_words", lambda c, at: _below(c.alphabetic_words, at.min_alphabetic_words)),
    ("few_stop_words", lambda c, at: _below(c.stop_words, at.min_stop_words)),
    ("bullets", lambda c, at: _above(c.line_share(_BULLET.match), at.max_bullet_lines)),
    ("ellipses", lambda c, at: _above(c.line_share(lambda s: s.endswith(("...", "…"))), at.max_ellipsis_lines)),
    ("no_sentences", lambda c, at: _below(c.line_share(lambda s: s.endswith(_ENDS)), at.min_sentence_lines)),
    ("repeated_lines", lambda c, at: _above(c.duplicate_lines, at.max_duplicate_lines)),
    ("repeated_word", lambda c, at: _above(c.top_word, at.max_top_word)),
    ("repeated_ngrams", lambda c, at: _above(c.duplicate_ngrams, at.max_duplicate_ngrams)),
)


def why_drop(document: Document, limits: Limits) -> str | None:
    """The name of the first rule that `document` breaks, or None."""
    counts = Counts(document.text, document.language)
    return next((name for name, breaks in RULES if breaks(counts, limits)), None)
