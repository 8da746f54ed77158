"""What a problem is, and which split it belongs to.

The split is a property of the problem and not of the seed that drew it: a problem is held out iff a hash of its
*content* (its numbers, without the words around them) falls in one tenth of the hash space. Content and not wording,
so that the English and the Chinese twin of one sum always lie on the same side, and no choice of seeds can leak.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from infra.errors import InputError

Language = Literal["en", "zh"]
Split = Literal["train", "heldout"]
HELDOUT_SHARE = 10  # one problem in ten
OPEN = "open"  # the verifier of a question that has no right answer


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question with its exact answer, or an open one, which has none.

    `chain` is a worked solution in the question's language (the text inside `<think>`), `answer` one right answer (the
    text inside `<answer>`); `verifier` names the function of `stages.problems.verify` that judges any other answer
    against `arguments`. `content` is the language-free key that decides the split.
    """

    id: str
    family: str
    language: Language
    level: int
    question: str
    chain: str
    answer: str
    verifier: str
    arguments: dict[str, Any]
    content: str

    @property
    def open(self) -> bool:
        """Whether nothing is right or wrong: rules of form and a reward model are all that can judge a reply."""
        return self.verifier == OPEN

    @property
    def split(self) -> Split:
        return split_of(self.content)

    @property
    def worked(self) -> str:
        """Question and worked reply as one plain text: how worked problems look in a pre-training mix."""
        return f"{self.question}\n<think>{self.chain}</think><answer>{self.answer}</answer>"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> Problem:
        return cls(**json.loads(line))


def digest(text: str) -> int:
    """64 bits of BLAKE2, the same on every machine and under every PYTHONHASHSEED."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(content: str) -> Split:
    """The side of a content; families that share their numbers, as chain_sum and word_sum do, share the side too."""
    return "heldout" if digest(content) % HELDOUT_SHARE == 0 else "train"


def write_problems(path: Path, problems: Iterable[Problem]) -> int:
    """Write one JSON object a line; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(problem.to_json() + "\n")
            count += 1
    return count


def read_problems(path: Path) -> Iterator[Problem]:
    """Read what `write_problems` wrote; `InputError` names the line that is no problem."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield Problem.from_json(line)
            except (TypeError, ValueError) as error:
                raise InputError(f"{path.name}, line {number}: not a problem ({error})") from error
