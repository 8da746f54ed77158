"""Rule rewards of R1: accuracy, format, language consistency (DeepSeek-R1, sections 2.2.2 and 2.3.2); two penalties.

Rules and no neural reward model, because a large-scale learner hacks a neural one. Every rule here is total: any text
gets a number in [0, 1]. A reply is judged whole: it must be exactly `<think>…</think><answer>…</answer>` and then end.

A new rule is a pure function in `REWARDS` or `PENALTIES` and a weight of its name in `RewardWeights`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from infra.config import Config, Field
from stages.problems.problem import Language, Problem
from stages.problems.verify import verify

REPLY = re.compile(r"<think>(?P<chain>.*?)</think><answer>(?P<answer>.*?)</answer>", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
HAN = r"[㐀-䶿一-鿿豈-﫿]"
WORD = re.compile(rf"(?P<han>{HAN})|(?P<letters>(?:(?!{HAN})[^\W\d_])+)")
LATIN = re.compile(r"[A-Za-zÀ-ɏ]+")
UNIT = re.compile(rf"{HAN}|(?:(?!{HAN})\w)+|[^\w\s]")  # what repeats: a Han character, a word or number, a sign
NGRAM = 4


class RewardWeights(Config):
    """How the rules add up. R1-Zero: accuracy + format; R1's reasoning stage adds language consistency."""

    accuracy: float = Field(1.0, ge=0, title="Accuracy", description="weight of a right answer")
    format: float = Field(0.2, ge=0, title="Format", description="weight of a well-formed reply")
    language: float = Field(0.0, ge=0, title="Language", description="weight of the share of target-language words")
    preference: float = Field(
        0.0, ge=0, title="Preference", description="What a point of the reward model is worth, if one is given"
    )
    repetition: float = Field(0.0, ge=0, title="Repetition", description="what a reply of nothing but repeats loses")
    overlong: float = Field(0.0, ge=0, title="Overlong", description="what a reply that fills its limit loses; DAPO: 1")
    overlong_margin: float = Field(
        0.2, gt=0, le=1, title="Overlong margin", description="Last share of the limit, where the loss grows; DAPO: 0.2"
    )


@dataclasses.dataclass(frozen=True)
class Judged:
    """One reply, whether it ended by itself, and what it is judged against."""

    problem: Problem
    text: str
    finished: bool
    language: Language  # the target
    tokens: int  # of the reply, its EOS included
    max_tokens: int  # the longest that it could have been


@dataclasses.dataclass(frozen=True)
class Score:
    """What the rules say of one reply: `rules` by name, each in [0, 1], and `reward`, their weighted sum."""

    reward: float
    rules: Mapping[str, float]

    @property
    def accuracy(self) -> float:
        return self.rules["accuracy"]

    @property
    def format(self) -> float:
        return self.rules["format"]

    @property
    def language(self) -> float:
        return self.rules["language"]


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


def repetition(text: str, n: int = NGRAM) -> float:
    """Share of the n-grams of `text` that it has said before; 0 for text of fewer than n + 1 units.

    Long chains under reinforcement learning learn to fill their length with repeats (Yeo et al. 2025, Demystifying Long
    Chain-of-Thought Reasoning in LLMs, the n-gram penalty).
    """
    units = UNIT.findall(text)
    total = len(units) - n + 1
    return 1 - len(set(zip(*(units[i:] for i in range(n)), strict=False))) / total if total > 0 else 0.0


def overlong(tokens: int, max_tokens: int, margin: int) -> float:
    """DAPO's soft overlong punishment, as a positive number: 0 up to `margin` tokens before the limit, then a straight
    line to 1 at the limit (Yu et al. 2025, DAPO, equation 13, where margin is L_cache)."""
    return min(1.0, max(0, tokens - (max_tokens - margin)) / max(margin, 1))


REWARDS: dict[str, Callable[[Judged, RewardWeights], float]] = {
    "accuracy": lambda reply, _: accuracy_reward(reply.problem, reply.text),
    "format": lambda reply, _: format_reward(reply.text, reply.finished),
    "language": lambda reply, _: language_consistency(chain_of(reply.text), reply.language),
}
PENALTIES: dict[str, Callable[[Judged, RewardWeights], float]] = {
    "repetition": lambda reply, _: repetition(reply.text),
    "overlong": lambda reply, weights: overlong(
        reply.tokens, reply.max_tokens, round(weights.overlong_margin * reply.max_tokens)
    ),
}
RULES = (*REWARDS, *PENALTIES)
JUDGED = ("preference", "process")  # what models say of a reply (`judges.py`), where there are any


def score(
    problem: Problem,
    text: str,
    finished: bool,
    weights: RewardWeights,
    language: Language | None = None,
    tokens: int = 0,
    max_tokens: int = 0,
) -> Score:
    """Judge one reply that ended by itself (`finished`) or not. `language`: the target; None: the problem's own."""
    reply = Judged(problem, text, finished, language or problem.language, tokens, max_tokens)
    rules = {name: rule(reply, weights) for name, rule in (REWARDS | PENALTIES).items()}
    earned = sum(getattr(weights, name) * rules[name] for name in REWARDS)
    lost = sum(getattr(weights, name) * rules[name] for name in PENALTIES)
    return Score(earned - lost, rules)
