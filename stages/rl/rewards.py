"""Rule rewards of R1: accuracy, format, language consistency (DeepSeek-R1, sections 2.2.2 and 2.3.2), tests of code;
two penalties.

Rules and no neural reward model, because a large-scale learner hacks a neural one. Every rule here is total: any text
gets a number in [0, 1]. A reply is judged whole: it must be exactly `<think>…</think><answer>…</answer>`, white space
around either part aside, and then end.

A new rule is a pure function in `REWARDS` or `PENALTIES` and a weight of its name in `RewardWeights`. A new way to pay
for the rules, such as Logic-RL's, is a function in `SCHEMES`. What a reply earns among others is in `group_rewards.py`.

Of an open problem nothing is right: it has no accuracy and no tests, and the other rules are paid by weight under every
scheme. What its reply is worth, preference models say (`judges.py`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Literal

from pydantic import model_validator

from infra.config import Config, Field
from stages.problems.boxed import last_box, plain
from stages.problems.problem import Language, Problem
from stages.problems.verify import Verdict, judge, readable

# White space may stand around its parts: DeepSeek-R1's own prompt (table 1) shows some between them.
REPLY = re.compile(r"\s*<think>(?P<chain>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
HAN = r"[㐀-䶿一-鿿豈-﫿]"
WORD = re.compile(rf"(?P<han>{HAN})|(?P<letters>(?:(?!{HAN})[^\W\d_])+)")
LATIN = re.compile(r"[A-Za-zÀ-ɏ]+")
UNIT = re.compile(rf"{HAN}|(?:(?!{HAN})\w)+|[^\w\s]")  # what repeats: a Han character, a word or number, a sign
# What is in no language: blocks of code, code between backquotes, LaTeX commands.
NO_LANGUAGE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\\[A-Za-z]+", re.DOTALL)
NGRAM = 4

Scheme = Literal["weighted", "logic_rl", "cosine"]


class CosineLength(Config):
    """What a reply is paid at its shortest and at its longest; the defaults are Open-R1's and TRL's."""

    right_short: float = Field(1.0, title="Right, short")
    right_long: float = Field(0.5, title="Right, long")
    wrong_short: float = Field(-1.0, title="Wrong, short")
    wrong_long: float = Field(-0.5, title="Wrong, long")
    cut_off: float = Field(-1.0, title="Cut off", description="A reply that did not end by itself")


class RewardWeights(Config):
    """How the rules add up. R1-Zero: accuracy + format; R1's reasoning stage adds language consistency.

    Most losses normalise rewards within a question's group, so an open question counts as much as any other whatever
    its weights: they hold points against format, language and penalties of the same replies. dr_grpo, rloo and ppo do
    not: there the weights of points also say how much open questions count beside right answers.
    """

    scheme: Scheme = Field(
        "weighted",
        title="Scheme",
        description="weighted: all rules by weight; logic_rl: Logic-RL's points instead of accuracy, format and tests; "
        "cosine: accuracy by length",
    )
    cosine: CosineLength = Field(CosineLength(), title="Cosine", description="Points of the scheme cosine")
    accuracy: float = Field(1.0, ge=0, title="Accuracy", description="weight of a right answer")
    format: float = Field(0.2, ge=0, title="Format", description="weight of a well-formed reply")
    language: float = Field(0.0, ge=0, title="Language", description="weight of the share of target-language words")
    preference: float = Field(
        0.0,
        ge=0,
        title="Preference",
        description="What a point of the reward model is worth; of general prompts alone, if given",
    )
    harmlessness: float = Field(
        0.0, ge=0, title="Harmlessness", description="A point's worth; of general prompts alone, if given"
    )
    tests: float = Field(0.0, ge=0, title="Tests", description="weight of the share of tests that a program passes")
    brevity: float = Field(
        0.0, ge=0, title="Brevity", description="of Kimi k1.5's length reward: ½ for the shortest of a group to −½"
    )
    repetition: float = Field(0.0, ge=0, title="Repetition", description="what a reply of nothing but repeats loses")
    overlong: float = Field(0.0, ge=0, title="Overlong", description="what a reply that fills its limit loses; DAPO: 1")
    overlong_margin: float = Field(
        0.2, gt=0, le=1, title="Overlong margin", description="Last share of the limit, where the loss grows; DAPO: 0.2"
    )

    @model_validator(mode="after")
    def _weights_fit_the_scheme(self) -> RewardWeights:
        unused = {"weighted": ("cosine",), "logic_rl": ("cosine", "accuracy", "format", "tests"), "cosine": ()}
        for name in unused[self.scheme]:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"scheme={self.scheme} does not use {name}: leave it at its default")
        return self


@dataclasses.dataclass(frozen=True)
class Judged:
    """One reply, whether it ended by itself, and what it is judged against."""

    problem: Problem
    text: str
    verdict: Verdict  # on its answer
    finished: bool
    language: Language  # the target
    tokens: int  # of the reply, its EOS included
    max_tokens: int  # the longest that it could have been


@dataclasses.dataclass(frozen=True)
class Score:
    """What the rules say of one reply: `rules` by name, each in [0, 1] (a preference model's points have no bounds),
    `reward`, what they are paid, and the `reason` why its answer is wrong ("" if it is right, or none can be)."""

    reward: float
    rules: Mapping[str, float]
    reason: str = ""

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
    """The chain and the answer of a well-formed reply, or None. Each tag appears once; only white space is outside."""
    match = REPLY.fullmatch(text)
    if match is None or any(text.count(tag) != 1 for tag in TAGS):
        return None
    return Reply(match["chain"], match["answer"])


def format_reward(text: str, finished: bool) -> float:
    """1 for a well-formed reply with a chain in it that ended by itself."""
    reply = parse(text)
    return float(finished and reply is not None and bool(reply.chain.strip()))


def answer_of(problem: Problem, text: str) -> str | None:
    r"""The text inside the only `<answer>…</answer>`; more than one answer is none.

    Where models that were not trained here put an answer counts too, if no tag of one is there: a program's ```python
    block or the last `\boxed{…}` (DeepSeek-R1, section 2.2.2), behind the chain.
    """
    if "<answer>" not in text and "</answer>" not in text:
        return untagged_answer(problem, text)
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    answer, closed, _ = text.partition("<answer>")[2].partition("</answer>")
    return answer if closed else None


def untagged_answer(problem: Problem, text: str) -> str | None:
    """The answer behind a chain, which some templates open in the prompt; a chain that never ended has none."""
    said = text.rpartition("</think>")[2]
    if "<think>" in said:
        return None
    if problem.verifier == "code":
        return said if "```" in said else None
    box = last_box(said)
    return box if box is None or problem.verifier == "boxed" else plain(box)


def verdict_on(problem: Problem, text: str, every_test: bool = False) -> Verdict:
    """What the answer in a reply is worth; see `stages.problems.verify.judge`."""
    answer = answer_of(problem, text)
    return Verdict(False, 0.0, "no single answer") if answer is None else judge(problem, answer, every_test)


def accuracy_reward(problem: Problem, text: str) -> float:
    """1 if the reply's answer is right."""
    return float(verdict_on(problem, text).right)


def language_consistency(chain: str, language: Language, question: str = "") -> float:
    """Share of the chain's words that are in `language`: Han characters against runs of Latin letters.

    Digits, signs, punctuation and what is in no language (code, LaTeX, in Chinese a single Latin letter) are neutral,
    and so are foreign words of the question itself: of `name` in "变量name" an answer has to speak. A chain without any
    word scores 0: else falling silent would be the easiest way to be consistent.
    """
    asked = {match[0] for match in WORD.finditer(question)}
    own = foreign = 0
    for match in WORD.finditer(NO_LANGUAGE.sub(" ", chain)):
        letters = match["letters"]
        if (language == "zh") if match["han"] else (language == "en" and LATIN.fullmatch(letters)):
            own += 1
        elif match[0] not in asked and not (language == "zh" and letters and len(letters) == 1):
            foreign += 1
    return own / (own + foreign) if own else 0.0


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
    "accuracy": lambda reply, _: float(reply.verdict.right),
    "format": lambda reply, _: format_reward(reply.text, reply.finished),
    "language": lambda reply, _: language_consistency(chain_of(reply.text), reply.language, reply.problem.question),
    "tests": lambda reply, _: reply.verdict.share,
}
PENALTIES: dict[str, Callable[[Judged, RewardWeights], float]] = {
    "repetition": lambda reply, _: repetition(reply.text),
    "overlong": lambda reply, weights: overlong(
        reply.tokens, reply.max_tokens, round(weights.overlong_margin * reply.max_tokens)
    ),
}
RULES = (*REWARDS, *PENALTIES)
OF_ANSWERS = ("accuracy", "tests")  # rules that an open problem does not have
NO_VERDICT = Verdict(False, 0.0, "")  # what its replies get instead
# What preference models say, each paid by the weight of its name → the input that the model is.
PREFERENCE_MODELS = {"preference": "reward_model", "harmlessness": "harmlessness_model"}
JUDGED = (*PREFERENCE_MODELS, "process")  # what models say of a reply (`judges.py`), where there are any


def weighted(reply: Judged, rules: Mapping[str, float], weights: RewardWeights) -> float:
    """Every rule by its weight."""
    return sum(getattr(weights, name) * rules[name] for name in REWARDS if name in rules)


def logic_rl(reply: Judged, rules: Mapping[str, float], weights: RewardWeights) -> float:
    """Format ±1; the answer +2 if right, −1.5 if wrong, −2 if it is none or the form is broken (Xie et al. 2025,
    Logic-RL, section 2.2). The form is ours: nothing but white space may stand outside the tags."""
    language = weights.language * rules["language"]
    answer = answer_of(reply.problem, reply.text)
    if not rules["format"] or answer is None:
        return language - 3.0
    if reply.verdict.right:
        return language + 3.0
    return language + 1.0 - (1.5 if readable(reply.problem, answer) else 2.0)


def cosine(reply: Judged, rules: Mapping[str, float], weights: RewardWeights) -> float:
    """Right answers are paid more the shorter, wrong ones less the shorter, along half a cosine (Yeo et al. 2025,
    Demystifying Long Chain-of-Thought Reasoning in LLMs, appendix C.1); the other rules by weight."""
    points = weights.cosine
    if not reply.finished:
        paid = points.cut_off
    elif reply.verdict.right:
        paid = half_cosine(reply.tokens, reply.max_tokens, points.right_short, points.right_long)
    else:
        paid = half_cosine(reply.tokens, reply.max_tokens, points.wrong_short, points.wrong_long)
    return weights.accuracy * (paid - rules["accuracy"]) + weighted(reply, rules, weights)


def half_cosine(tokens: int, max_tokens: int, first: float, last: float) -> float:
    """From `first` at 0 tokens to `last` at `max_tokens`, level at both ends."""
    share = min(1.0, tokens / max_tokens) if max_tokens else 0.0
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


SCHEMES: dict[Scheme, Callable[[Judged, Mapping[str, float], RewardWeights], float]] = {
    "weighted": weighted,
    "logic_rl": logic_rl,
    "cosine": cosine,
}


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
    verdict = NO_VERDICT if problem.open else verdict_on(problem, text, every_test=weights.tests > 0)
    reply = Judged(problem, text, verdict, finished, language or problem.language, tokens, max_tokens)
    asked = [name for name in RULES if not (problem.open and name in OF_ANSWERS)]
    rules = {name: (REWARDS | PENALTIES)[name](reply, weights) for name in asked}
    pay = weighted if problem.open else SCHEMES[weights.scheme]
    lost = sum(getattr(weights, name) * rules[name] for name in PENALTIES)
    return Score(pay(reply, rules, weights) - lost, rules, verdict.reason)
