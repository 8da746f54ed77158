"""The steps of a reply: what process supervision rewards one by one, and a process reward model scores.

    <think>first 3+4=7,| then 7-2=5|</think><answer>5</answer>

A chain is cut at its lines; if it has only one, at its sentences; if that is one as well, at its clauses. The answer is
a step of its own. Cuts fall where no token of natural text crosses, so steps may be encoded one by one.
"""

from __future__ import annotations

import re

OPENING = re.compile(r"\s*(?:<think>)?\s*")
CLOSERS = r"""["'”’)\]）】》」』]*"""
SEPARATORS = (
    re.compile(r"\n+"),
    re.compile(rf"[.!?;]+{CLOSERS}(?=\s)|[。！？；]+{CLOSERS}"),
    re.compile(r",(?=\s)|，"),
)


def split_steps(text: str) -> list[str]:
    """The steps of a chain, or of a whole reply with its tags; together they are the text. An empty text has none."""
    chain, tag, answer = text.partition("</think>")
    steps = _cut(chain)
    return [*steps, tag + answer] if tag else steps


def _cut(chain: str) -> list[str]:
    start, end = OPENING.match(chain).end(), len(chain.rstrip())
    for separator in SEPARATORS:
        places = [match.end() for match in separator.finditer(chain, start) if match.end() < end]
        if places:
            return [chain[a:b] for a, b in zip([0, *places], [*places, len(chain)], strict=True)]
    return [chain] if chain else []
