"""Probes judge replies by rules: these are the replies, and what the rules must say of them."""

import dataclasses
import json

import pytest

from stages.evaluation.probes import PROBES, Material, build, judge, measures
from stages.problems.registry import generate
from stages.tokens.tools import calls_text


@pytest.fixture(scope="module")
def cases():
    heldout, train = (
        generate(("chain_sum", "sort"), ("en", "zh"), 40, 0, split, (1,)) for split in ("heldout", "train")
    )
    return build(Material(heldout, train, cases=6, shots=2, seed=0))


def of(cases, probe, language="en", variant=""):
    return next(c for c in cases if (c.probe, c.language, c.variant) == (probe, language, variant))


def test_every_probe_has_its_cases_in_both_languages(cases):
    counted = {
        (p, lang): sum(c.probe == p and c.language == lang for c in cases) for p in PROBES for lang in ("en", "zh")
    }
    once, twice = ("language", "json", "tools"), ("shots", "turns")
    assert all(counted[p, lang] == 6 for p in once for lang in ("en", "zh"))
    assert all(counted[p, lang] == 12 for p in twice for lang in ("en", "zh"))
    assert cases == build(Material(*_problems(), cases=6, shots=2, seed=0))  # the same seed, the same cases


def _problems():
    return [generate(("chain_sum", "sort"), ("en", "zh"), 40, 0, split, (1,)) for split in ("heldout", "train")]


@pytest.mark.parametrize(
    ("language", "chain", "mixed", "foreign", "wordless"),
    [
        ("zh", "先算3+4=7", False, False, False),
        ("zh", "设x=3，先算x+4=7", False, False, False),
        ("zh", "先算3+4=7, then done", True, False, False),
        ("zh", "first 3+4=7", False, True, False),
        ("en", "首先 3+4=7", False, True, False),
        ("en", "3+4=7", False, False, True),
    ],
)
def test_a_chain_mixes_if_it_has_words_of_both_languages(cases, language, chain, mixed, foreign, wordless):
    verdict = judge(of(cases, "language", language), f"<think>{chain}</think><answer>7</answer>")
    assert verdict == {"chain_mixed": mixed, "chain_foreign": foreign, "chain_wordless": wordless}


def test_json_must_parse_and_fit_and_be_right(cases):
    case = of(cases, "json")
    right = {"result": case.expected.answer, "certain": True}

    def verdict(said):
        return tuple(judge(case, f"<think>so</think><answer>{said}</answer>").values())

    assert verdict(json.dumps(right)) == (True, True, True)
    assert judge(case, json.dumps(right))["json_right"]  # without tags as well
    assert verdict(json.dumps(right | {"result": "x"})) == (True, True, False)
    assert verdict(json.dumps(right | {"certain": "yes"})) == (True, False, False)
    assert verdict(json.dumps(right | {"more": 1})) == (True, False, False)
    assert verdict(case.expected.answer.split()[0]) == (True, False, False)  # a bare number is JSON
    assert verdict("{" * 100_000) == (False, False, False)
    assert verdict(f"```json\n{json.dumps(right)}\n```") == (False, False, False)


def test_a_call_must_name_the_tool_with_its_arguments(cases):
    def verdict(case, *calls):
        said = calls_text([{"type": "function", "function": call} for call in calls])
        return tuple(judge(case, f"<think>so</think>{said}").values())

    for case in (c for c in cases if c.probe == "tools"):
        call = case.expected
        turned = {k: v[::-1] if isinstance(v, list) else v for k, v in call["arguments"].items()}
        assert verdict(case, call) == verdict(case, {**call, "arguments": turned}) == (True, True, True)
        assert verdict(case, {**call, "arguments": {"numbers": [0]}}) == (True, True, False)
        assert verdict(case, {**call, "name": "other"}) == (True, False, False)
        assert verdict(case, call, call) == (True, False, False)
        assert judge(case, "<answer>3</answer>")["tool_called"] is False
        offered = next(t["function"] for t in case.tools if t["function"]["name"] == call["name"])
        assert offered["parameters"]["required"] == list(call["arguments"])


def test_a_follow_up_needs_the_first_turn_and_examples_stand_before_the_question(cases):
    turns = of(cases, "turns", "zh", "two_turns")
    _, reply, last = (message["content"] for message in turns.messages)
    assert turns.expected.answer not in last
    assert judge(turns, f"<think>so</think><answer>{turns.expected.answer}</answer>") == {"two_turns_right": True}
    assert not judge(turns, reply)["two_turns_right"]  # the first answer again
    bare, shown = (of(cases, "shots", "en", variant) for variant in ("zero_shot", "few_shot"))
    assert bare.pair == shown.pair
    assert shown.messages[0]["content"].endswith("\n\n" + bare.messages[0]["content"])
    assert shown.messages[0]["content"].count("<answer>") == 2


def test_shares_and_gains_are_counted_over_cases_and_pairs(cases):
    verdicts = []
    for case in cases:
        answer = f"<think>so</think><answer>{case.expected.answer}</answer>" if case.probe in ("shots", "turns") else ""
        verdicts.append(judge(case, "" if case.variant == "few_shot" and case.language == "zh" else answer))
    found = measures(cases, verdicts)
    assert (found["zero_shot_right"].value, found["few_shot_right"].value, found["few_shot_gain"].value) == (
        1,
        0.5,
        -0.5,
    )
    assert found["few_shot_gain"].low < -0.5 < found["few_shot_gain"].high < 0
    assert (found["few_shot_gain_en"].value, found["few_shot_gain_zh"].value) == (0, -1)
    assert found["two_turns_gain"].value == 0
    assert 0 < found["json_parses"].high < 0.3  # none of twelve: no share is known to be nought
    assert found["chain_wordless"].value == 1


def test_twins_of_one_problem_are_drawn_together(cases):
    english = [case for case in cases if case.language == "en" and case.probe in ("json", "shots")]
    twins = [dataclasses.replace(case, language="zh", pair=f"{case.pair} zh") for case in english]
    right = {case.content: number % 3 == 0 for number, case in enumerate(english)}

    def verdict(case):
        if case.probe == "json":
            return {"json_right": right[case.content]}
        return {f"{case.variant}_right": right[case.content] and case.variant == "few_shot"}

    both = [*english, *twins]
    found = measures(both, list(map(verdict, both)))
    for name in ("json_right", "few_shot_right", "few_shot_gain"):
        assert found[name].low < found[name].value < found[name].high
        assert found[name] == found[f"{name}_en"]  # twins that agree tell no more than one of them
