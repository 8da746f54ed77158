"""Text of a reply while its tokens are still coming: whole characters, thinking kept apart from the answer.

A token of a byte-level vocabulary may end in the middle of a character, and a marker such as `</think>` may come in
pieces, so both streams hold back what the next piece could still change, and nothing else. `close` gives the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from stages.tokens.bpe import Tokenizer
from stages.tokens.tools import CALLS, read_calls

THINK, END_THINK = "<think>", "</think>"
BROKEN = "\ufffd"  # what bytes that are no character are decoded to, a character that is not whole yet among them


class TextStream:
    """Ids in, whole characters out; put together they are `tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []  # ids since the last that ended a character
        self._given = 0  # characters of them that are out

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now. Only the last character can be half of one: it is kept back."""
        self._pending += ids
        text = self._tokenizer.decode(self._pending, skip_special=False)
        certain = text.removesuffix(BROKEN)
        new = certain[self._given :]
        self._pending, self._given = (self._pending, len(certain)) if text != certain else ([], 0)
        return new

    def close(self) -> str:
        """What no further token can mend."""
        text = self._tokenizer.decode(self._pending, skip_special=False)[self._given :]
        self._pending, self._given = [], 0
        return text


class Said(NamedTuple):
    """A stretch of a reply, from inside <think>…</think> or from outside; the markers themselves are in neither."""

    text: str
    thinking: bool


class ThinkingStream:
    """Text in, stretches of thinking and of answer out."""

    def __init__(self) -> None:
        self._held, self._thinking = "", False

    def push(self, text: str) -> list[Said]:
        said: list[Said] = []
        self._held += text
        while True:
            marker = END_THINK if self._thinking else THINK
            before, found, after = self._held.partition(marker)
            if not found:
                break
            said.append(Said(before, self._thinking))
            self._thinking, self._held = not self._thinking, after
        ready, self._held = hold_back(self._held, [marker])
        said.append(Said(ready, self._thinking))
        return [stretch for stretch in said if stretch.text]

    def close(self) -> list[Said]:
        held, self._held = self._held, ""
        return [Said(held, self._thinking)] if held else []


class CallStream:
    """Text of an answer in, what stands before its calls of tools out; the calls themselves when it is over."""

    def __init__(self) -> None:
        self._held, self._calling = "", False

    def push(self, text: str) -> str:
        self._held += text
        if self._calling:
            return ""
        before, found, rest = self._held.partition(CALLS)
        if found:
            self._calling, self._held = True, found + rest
            return before
        ready, self._held = hold_back(before, [CALLS])
        return ready

    def close(self) -> tuple[str, list[dict[str, Any]]]:
        """(text that was no call after all, the calls)."""
        held, self._held = self._held, ""
        return read_calls(held)


def hold_back(text: str, markers: Iterable[str]) -> tuple[str, str]:
    """`text` cut in two: what is certain, and the longest end of it that begins one of the markers."""
    longest = max(
        (n for marker in markers for n in range(1, min(len(marker), len(text) + 1)) if text.endswith(marker[:n])),
        default=0,
    )
    return text[: len(text) - longest], text[len(text) - longest :]
