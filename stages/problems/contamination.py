"""Which texts ask a held-out problem: by the whole question, or by a run of its words.

A run is ten words, as in DeepSeekMath (section 2.1), or twenty Chinese characters, which say about as much. A shorter
question is looked for whole if it has three words, and compared as it is if it has fewer. One run that is in both is
enough: boilerplate that problems share costs some data, a question that slips through costs the measurement.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from stages.corpus.normalize import exact_key
from stages.corpus.shingles import HAN, words
from stages.problems.problem import Problem

RUN, RUN_HAN, SHORTEST = 10, 20, 3  # words; a Chinese character is a word

Run = tuple[int, ...]  # hashes of words


class HeldOut:
    """Questions that must not be learnt from."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self._whole: dict[str, str] = {}  # a question as it is compared → the problem's id
        self._runs: dict[int, dict[Run, str]] = {}  # length → run → the problem's id
        for problem in problems:
            self._whole.setdefault(exact_key(problem.question), problem.id)
            found = words(problem.question)
            mostly_han = 2 * int((found.classes[found.starts] == HAN).sum()) > len(found)
            length = min(len(found), RUN_HAN if mostly_han else RUN)
            if length >= SHORTEST:
                runs = self._runs.setdefault(length, {})
                for run in _runs(found.hashes.tolist(), length):
                    runs.setdefault(run, problem.id)

    def asked_in(self, text: str) -> str | None:
        """The id of a problem that the text asks, or of one of those."""
        if id := self._whole.get(exact_key(text)):
            return id
        hashes = words(text).hashes.tolist()
        for length, known in self._runs.items():
            for run in _runs(hashes, length):
                if id := known.get(run):
                    return id
        return None


def _runs(hashes: list[int], length: int) -> Iterator[Run]:
    return zip(*(islice(hashes, place, None) for place in range(length)), strict=False)
