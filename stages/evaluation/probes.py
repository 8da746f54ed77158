"""Probes of R1's named weaknesses: language mixing, few-shot prompts, structured output, tools, several turns.

DeepSeek-R1 (section 5) names them in words; here each is a set of cases, made of the problem families in English and
Chinese, whose replies a rule judges. Weaknesses that show only against something are asked twice about the same thing
(with and without examples, over two turns and in one) and compared pair by pair.

A small model scores near zero on what it was never taught. That is a result: the share and its interval say so.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from stages.evaluation.intervals import bootstrap_share, paired_difference
from stages.evaluation.measures import Measure
from stages.problems.problem import Language, Problem, split_of
from stages.problems.registry import FAMILIES, LANGUAGES
from stages.problems.verify import verify
from stages.rl.rewards import HAN, accuracy_reward, chain_of
from stages.tokens.tools import read_calls

Message = Mapping[str, str]
# A single Latin letter is a symbol: x in a Chinese chain is no English.
WORDS = {"zh": re.compile(HAN), "en": re.compile(r"[A-Za-zÀ-ɏ]{2,}")}


@dataclasses.dataclass(frozen=True)
class Case:
    """A conversation that awaits a reply. `pair` is shared by the prompts that are compared, `content` by cases of the
    same numbers in other words or the other language; `expected` is the problem to be answered or the call to be made.
    """

    probe: str
    pair: str
    content: str
    language: Language
    messages: tuple[Message, ...]
    expected: Any
    variant: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class Material:
    """What cases are made of: the problems to ask, those to show as examples, and how many of each."""

    heldout: Sequence[Problem]
    train: Sequence[Problem]
    cases: int  # of each probe and language
    shots: int
    seed: int

    def asked(self, language: Language, verifier: str | None = None) -> list[Problem]:
        """The first held-out problems of a language, and of a verifier."""
        fitting = [p for p in self.heldout if p.language == language and verifier in (None, p.verifier)]
        return fitting[: self.cases]

    def rng(self, probe: str, language: Language) -> Random:
        return Random(f"{self.seed}/{probe}/{language}")


def user(text: str) -> Message:
    return {"role": "user", "content": text}


# ---- language mixing


def language_cases(material: Material, language: Language) -> list[Case]:
    return [Case("language", p.id, p.content, language, (user(p.question),), p) for p in material.asked(language)]


def judge_language(case: Case, text: str) -> dict[str, bool]:
    """Whether the chain has words of both languages, only of the other one, or none at all."""
    chain = chain_of(text)
    found = {language for language, word in WORDS.items() if word.search(chain)}
    mixed = len(found) == len(WORDS)
    return {
        "chain_mixed": mixed,
        "chain_foreign": bool(found) and case.language not in found,
        "chain_wordless": not found,
    }


# ---- few-shot sensitivity


def shot_cases(material: Material, language: Language) -> list[Case]:
    """Each problem bare, and behind worked problems of its own family; a family without enough of them is left out."""
    rng = material.rng("shots", language)
    cases = []
    for problem in material.asked(language):
        examples = [p for p in material.train if (p.family, p.language) == (problem.family, language)]
        if len(examples) >= material.shots:
            shown = "\n\n".join([*(p.worked for p in rng.sample(examples, material.shots)), problem.question])
            for variant, prompt in (("zero_shot", problem.question), ("few_shot", shown)):
                cases.append(Case("shots", problem.id, problem.content, language, (user(prompt),), problem, variant))
    return cases


def judge_right(case: Case, text: str) -> dict[str, bool]:
    return {f"{case.variant}_right": accuracy_reward(case.expected, text) > 0}


# ---- JSON

JSON_WANTED = {
    "en": ' Answer with JSON alone: {"result": the answer as text, "certain": true or false}.',
    "zh": '只用JSON回答：{"result": 答案文本, "certain": true或false}。',
}


def json_cases(material: Material, language: Language) -> list[Case]:
    wanted = JSON_WANTED[language]
    return [Case("json", p.id, p.content, language, (user(p.question + wanted),), p) for p in material.asked(language)]


def judge_json(case: Case, text: str) -> dict[str, bool]:
    """Whether the answer is JSON, has the two fields of the right types and no other, and is right. No fence is cut."""
    try:
        value = json.loads(answer_of(text))
        parses = True
    except (ValueError, RecursionError):
        value, parses = None, False
    fits = isinstance(value, dict) and value.keys() == {"result", "certain"}
    fits = fits and isinstance(value["result"], str) and isinstance(value["certain"], bool)
    return {"json_parses": parses, "json_fits": fits, "json_right": fits and verify(case.expected, value["result"])}


def answer_of(text: str) -> str:
    """What a reply says behind its chain, without the tags of the answer."""
    said = text.rpartition("</think>")[2].strip()
    return said.removeprefix("<answer>").removesuffix("</answer>").strip()


# ---- tools

NUMBERS = {"numbers": {"type": "array", "items": {"type": "integer"}}}
DIGITS = {"digits": {"type": "string"}}
# family -> (tool, its parameters, what it does, the arguments that the family's numbers make)
TOOLS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, str], Callable[[Mapping[str, Any]], Any]]] = {
    "compare": ("largest", NUMBERS, {"en": "The largest number.", "zh": "最大的数。"}, lambda n: n["values"]),
    "sort": ("sort", NUMBERS, {"en": "Sort ascending.", "zh": "从小到大排序。"}, lambda n: n["values"]),
    "gcd": (
        *("gcd", NUMBERS, {"en": "The greatest common divisor.", "zh": "最大公约数。"}),
        lambda n: [n["larger"], n["smaller"]],
    ),
    "reverse": ("reverse", DIGITS, {"en": "Reverse the digits.", "zh": "把数字倒过来。"}, lambda n: n["digits"]),
}


def tools_offered(language: Language) -> tuple[Mapping[str, Any], ...]:
    """All tools as the messages convention describes them."""
    return tuple(
        {
            "type": "function",
            "function": {
                "name": name,
                "description": does[language],
                "parameters": {"type": "object", "properties": parameters, "required": list(parameters)},
            },
        }
        for name, parameters, does, _ in TOOLS.values()
    )


def tool_cases(material: Material, language: Language) -> list[Case]:
    """Questions of four families in turn, each of which one of the tools answers."""
    rng, tools = material.rng("tools", language), tools_offered(language)
    cases: list[Case] = []
    while len(cases) < material.cases:
        family = FAMILIES[list(TOOLS)[len(cases) % len(TOOLS)]]
        numbers = family.draw(rng, 1)
        content = family.content(numbers)
        if split_of(content) != "heldout":
            continue
        name, parameters, _, arguments = TOOLS[family.name]
        question = family.write(numbers, language, rng).question
        call = {"name": name, "arguments": dict.fromkeys(parameters, arguments(numbers))}
        cases.append(Case("tools", f"{language}-{len(cases)}", content, language, (user(question),), call, tools=tools))
    return cases


def judge_tools(case: Case, text: str) -> dict[str, bool]:
    """Whether there is one call, of the right tool, with the right arguments (numbers in any order)."""
    _, calls = read_calls(text.rpartition("</think>")[2])
    made = calls[0]["function"] if len(calls) == 1 else None
    named = made is not None and made["name"] == case.expected["name"]
    right = named and _plain(made["arguments"]) == _plain(case.expected["arguments"])
    return {"tool_called": bool(calls), "tool_named": named, "tool_right": right}


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with lists as multisets, for none of the tools minds the order."""
    return {k: sorted(map(repr, value)) if isinstance(value, list) else value for k, value in arguments.items()}


# ---- several turns

ADD = {"en": ("Add {} to that.", "Compute {}+{}."), "zh": ("再加{}。", "计算{}+{}。")}


def turn_cases(material: Material, language: Language) -> list[Case]:
    """A follow-up that can only be answered from the first turn, and the same sum asked in one."""
    rng = material.rng("turns", language)
    cases = []
    for problem in material.asked(language, "integer"):
        value, more = problem.arguments["value"], rng.randint(1, 9)
        total = value + more
        wanted = dataclasses.replace(problem, answer=str(total), arguments={"value": total})
        follow_up, at_once = ADD[language]
        replied = problem.worked.removeprefix(problem.question + "\n")
        first = (user(problem.question), {"role": "assistant", "content": replied})
        for variant, messages in (
            ("two_turns", (*first, user(follow_up.format(more)))),
            ("one_turn", (user(at_once.format(value, more)),)),
        ):
            cases.append(Case("turns", problem.id, problem.content, language, messages, wanted, variant))
    return cases


# ---- all of them

Build = Callable[[Material, Language], list[Case]]
Judge = Callable[[Case, str], dict[str, bool]]
PROBES: Mapping[str, tuple[Build, Judge]] = {
    "language": (language_cases, judge_language),
    "shots": (shot_cases, judge_right),
    "json": (json_cases, judge_json),
    "tools": (tool_cases, judge_tools),
    "turns": (turn_cases, judge_right),
}
DIFFERENCES = {  # name -> (measure, less this one), of the same pairs
    "few_shot_gain": ("few_shot_right", "zero_shot_right"),
    "two_turns_gain": ("two_turns_right", "one_turn_right"),
}


def build(material: Material, languages: Sequence[Language] = LANGUAGES) -> list[Case]:
    return [case for make, _ in PROBES.values() for language in languages for case in make(material, language)]


def judge(case: Case, text: str) -> dict[str, bool]:
    """The measures of one reply."""
    return PROBES[case.probe][1](case, text)


def measures(cases: Sequence[Case], verdicts: Sequence[Mapping[str, bool]], seed: int = 0) -> dict[str, Measure]:
    """Every share and every difference, over all and by language (`_en`, `_zh`), with bootstrap intervals over
    contents: twins of one problem are not independent draws. A share of which all agree has Wilson's."""
    found: dict[str, Measure] = {}
    for suffix, languages in (("", LANGUAGES), *((f"_{language}", (language,)) for language in LANGUAGES)):
        chosen = [(c, v) for c, v in zip(cases, verdicts, strict=True) if c.language in languages]
        contents = {case.pair: case.content for case, _ in chosen}
        shares: dict[str, dict[str, bool]] = {}
        for case, verdict in chosen:
            for name, holds in verdict.items():
                shares.setdefault(name, {})[case.pair] = holds
        for name, by_pair in shares.items():
            values, clusters = list(map(float, by_pair.values())), [contents[pair] for pair in by_pair]
            found[name + suffix] = Measure.of(bootstrap_share(values, clusters, seed))
        for name, (left, right) in DIFFERENCES.items():
            if left in shares:
                both = [(float(shares[left][pair]), float(shares[right][pair])) for pair in shares[left]]
                lefts, rights = zip(*both, strict=True)
                clusters = [contents[pair] for pair in shares[left]]
                found[name + suffix] = Measure.of(paired_difference(lefts, rights, clusters, seed))
    return found
