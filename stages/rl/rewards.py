"""Rule rewards of R1: accuracy, format, language consistency (DeepSeek-R1, sections 2.2.2 and 2.3.2).

Rules and no neural reward model, because a large-scale learner hacks a neural one. Every rule here is total: any text
gets a number. A reply is judged whole: it must be exactly `<think>…</think><answer>…</answer>` and then end.
"""

from __future__ import annotations

import dataclasses
import re

from infra.config import Config, Field
from stages.problems.problem import Language, Problem
from stages.problems.verify import verify

REPLY = re.compile(r"<think>(?P<chain>.*?)</think><answer>(?P<answer>.*?)</answer>", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
HAN = r"[㐀-䶿一-鿿豈-﫿]"
WORD = re.compile(rf"(?P<han>{HAN})|(?P<letters>(?:(?!{HAN})[^\W\d_])+)")
LATIN = re.compile(r"[A-Za-zÀ-ɏ]+")


class RewardWeights(Config):
    """How the rules add up. R1-Zero: accuracy + format; R1's reasoning stage adds language consistency."""

    accuracy: float = Field(1.0, ge=0, title="Accuracy", description="weight of a right answer")
    format: float = Field(0.2, ge=0, title="Format", description="weight of a well-formed reply")
    language: float = Field(0.0, ge=0, title="Language", description="weight of the share of target-language words")


@dataclasses.dataclass(frozen=True)
class Score:
    """What the rules say of one reply; each in [0, 1] but for `reward`, their weighted sum."""

    reward: float
    accuracy: float
    format: float
    language: float


@dataclasses.dataclass(frozen=True)
class Reply:
    chain: str
    answer: str


def parse(text: str) -> Reply | None:
    """The chain and the answer of a well-formed reply, or None. Each tag appears once, and nothing lies outside."""
    match = REPLY.fullmatch(text)
    if match is None or any(text.count(tag) != 1 for tag in TAGS):
        return None
    return Reply(match["chain"], match["answer"])


def format_reward(text: str, finished: bool) -> float:
    """1 for a well-formed reply with a chain in it that ended by itself."""
    reply = parse(text)
    return float(finished and reply is not None and bool(reply.chain.strip()))


def accuracy_reward(problem: Problem, text: str) -> float:
    """1 if the text inside the only `<answer>…</answer>` is right; more than one answer is none."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return 0.0
    _, _, tail = text.partition("<answer>")
    answer, closed, _ = tail.partition("</answer>")
    return float(bool(closed) and verify(problem, answer))


def language_consistency(chain: str, language: Language) -> float:
    """Share of the chain's words that are in `language`: Han characters against runs of Latin letters.

    Digits, signs and punctuation are neutral. A chain without any word scores 0: else falling silent
    would be the easiest way to be consistent.
    """
    han = latin = other = 0
    for match in WORD.finditer(chain):
        if match["han"]:
            han += 1
        elif LATIN.fullmatch(match["letters"]):
            latin += 1
        else:
            other += 1
    words = han + latin + other
    return {"zh": han, "en": latin}[language] / words if words else 0.0


def chain_of(text: str) -> str:
    """The chain of a reply, also of one that is cut off or malformed ("" if it never began to think)."""
    return text.partition("<think>")[2].partition("</think>")[0]


def overlong_punishment(length: int, finished: bool, longest: int, margin: int) -> float:
    """0 for a reply of at most `longest` − `margin` tokens, then falling in a line to −1 at `longest` (DAPO,
    2503.14476, equation 13). A reply that was cut off is longer than any allowed: −1."""
    return min(0.0, (longest - margin - length) / margin) if finished else -1.0


def score(
    problem: Problem, text: str, finished: bool, weights: RewardWeights, language: Language | None = None
) -> Score:
    """Judge one reply that ended by itself (`finished`) or not. `language`: the target; None: the problem's own."""
    accuracy = accuracy_reward(problem, text)
    form = format_reward(text, finished)
    consistency = language_consistency(chain_of(text), language or problem.language)
    reward = weights.accuracy * accuracy + weights.format * form + weights.language * consistency
    return Score(reward, accuracy, form, consistency)
