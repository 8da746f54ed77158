"""Text as it is kept, and text as it is compared.

Kept text is only repaired (NFC, one newline, no control or zero-width characters): DeepSeek's normalizer is empty, and
NFKC would turn （ into ( and ① into 1. Compared text is folded further, and never stored.
"""

from __future__ import annotations

import re
import unicodedata

_UNWANTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff\ufff9-\ufffb]")
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")


def clean(text: str) -> str:
    """Kept text: NFC, \\n line ends, no control or zero-width characters, no trailing blanks, single empty lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n")
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    text = _TRAILING.sub("", _UNWANTED.sub("", text))
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


def exact_key(text: str) -> str:
    """Compared text: two documents with equal keys are exact duplicates. Case, width and white space do not count."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.lower().split())
