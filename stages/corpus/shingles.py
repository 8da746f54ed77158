"""Words and 5-word shingles of mixed Chinese and English text as 64-bit hashes, without a Python loop over words.

A word is a run of letters and digits, lower-cased; every Chinese character is a word of its own (splitting on spaces
alone would make a Chinese sentence one word). Full-width letters count as their ASCII twins.

A word's hash is a polynomial in its code points modulo 2^64, read off prefix sums: (H[end] - H[start]) * base^-start.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

SHINGLE_WORDS = 5
SEPARATOR, WORD, HAN = 0, 1, 2

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_PLACES = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xFF51AFD7ED558CCD)


@dataclass(frozen=True)
class Words:
    """The words of one text, in order: hash, first and past-the-last character."""

    hashes: np.ndarray  # uint64 [n]
    starts: np.ndarray  # int64 [n]
    ends: np.ndarray  # int64 [n]
    classes: np.ndarray  # uint8 [characters]: SEPARATOR, WORD or HAN

    def __len__(self) -> int:
        return len(self.hashes)


def words(text: str) -> Words:
    codes = np.frombuffer(text.lower().encode("utf-32-le", "surrogatepass"), np.uint32)
    wide = (codes >= 0xFF01) & (codes <= 0xFF5E)
    codes = np.where(wide, codes - np.uint32(0xFEE0), codes)
    codes = np.where((codes >= 65) & (codes <= 90), codes + np.uint32(32), codes)  # full-width capitals
    classes = _character_classes()[codes]
    word, han = classes == WORD, classes == HAN
    before, after = np.zeros_like(word), np.zeros_like(word)
    before[1:], after[:-1] = word[:-1], word[1:]
    starts = np.flatnonzero(han | (word & ~before))
    ends = np.flatnonzero(han | (word & ~after)) + 1
    powers, inverses = _powers(max(len(codes), 1).bit_length())
    prefix = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * powers[: len(codes)], out=prefix[1:])
    return Words(mix((prefix[ends] - prefix[starts]) * inverses[starts]), starts, ends, classes)


def ngrams(hashes: np.ndarray, n: int = SHINGLE_WORDS) -> np.ndarray:
    """Hashes of all runs of n words (n <= 5); the whole text is one run if it is shorter. uint64, with repeats."""
    if len(hashes) < n:
        n = len(hashes)
    if n == 0:
        return np.zeros(0, np.uint64)
    count = len(hashes) - n + 1
    total = hashes[:count] * np.uint64(_PLACES[0])
    for place in range(1, n):
        total = total + hashes[place : place + count] * np.uint64(_PLACES[place])
    return mix(total)


def shingles(text: str) -> np.ndarray:
    """The set of a text's 5-word shingles as sorted distinct uint64."""
    return np.unique(ngrams(words(text).hashes))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sorted arrays of distinct hashes; 0 when both are empty."""
    small, large = (a, b) if len(a) <= len(b) else (b, a)
    if not len(small):
        return 0.0
    places = np.searchsorted(large, small)
    places[places == len(large)] = 0
    common = int((large[places] == small).sum())
    return common / (len(a) + len(b) - common)


def mix(hashes: np.ndarray) -> np.ndarray:
    """MurmurHash3's 64-bit finalizer: every input bit reaches every output bit."""
    hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return hashes ^ (hashes >> np.uint64(33))


@cache
def _character_classes() -> np.ndarray:
    """SEPARATOR, WORD or HAN for every code point; uint8 [0x110000]."""
    classes = np.zeros(0x110000, np.uint8)
    classes[[code for code in range(0x30000) if chr(code).isalnum()]] = WORD
    for first, last in ((0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FFFF)):
        classes[first : last + 1] = HAN
    classes[0x3007] = HAN  # 〇
    return classes


@cache
def _powers(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """base^i and base^-i modulo 2^64 for i <= 2^bits."""
    powers = []
    for base in (_BASE, _INVERSE):
        factors = np.full((1 << bits) + 1, base, np.uint64)
        factors[0] = 1
        powers.append(np.cumprod(factors, dtype=np.uint64))
    return powers[0], powers[1]
