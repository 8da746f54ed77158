"""Families, splits and verifiers against brute force and hostile text."""

import itertools
import re
import subprocess
import sys
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError
from stages.problems import islanders
from stages.problems.expression import ExpressionError, evaluate
from stages.problems.knights_and_knaves import CLAIMS, solutions
from stages.problems.problem import Problem, read_problems, write_problems
from stages.problems.registry import FAMILIES, LANGUAGES, WITHOUT_SANDBOX, generate, make
from stages.problems.verify import VERIFIERS, ballot, verify

EVERYTHING = WITHOUT_SANDBOX  # programs: test_programs.py
LONGEST = {"islanders": (500, 1400)}  # characters of question and chain, where they are not those of the tiny families
HOSTILE = (
    *("", " ", "9**9**9", "9^9^9", "1/0", "1/(1-1)", "__import__('os')", "1e9", "0x10", "1_0", "+1", "--1", "-", "1+"),
    *("nan", "inf", "\x00", "\u202e1", "🂡", "1\n", "٣", "３", "²", "½"),
    *("10" * 500, "9" * 10_000, "(" * 5000 + "1" + ")" * 5000, "(" * 30 + "1" + ")" * 30),
)


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_worked_answer_satisfies_its_verifier_and_the_chain_ends_in_it(name):
    rng = Random(1)
    for language, level in itertools.product(LANGUAGES, range(1, FAMILIES[name].levels + 1)):
        for _ in range(50):
            problem = make(FAMILIES[name], language, level, rng)
            assert verify(problem, problem.answer)
            assert verify(problem, f" {problem.answer} ")
            assert not verify(problem, f"The answer is {problem.answer}")
            question, chain = LONGEST.get(name, (90, 140))
            assert len(problem.question) < question
            assert len(problem.chain) < chain


@pytest.mark.parametrize("name", EVERYTHING)
def test_no_hostile_text_passes_or_crashes_a_verifier(name):
    problem = make(FAMILIES[name], "en", 1, Random(7))
    for text in HOSTILE:
        assert verify(problem, text) is (text.strip() == "３" and problem.answer == "3")


@given(st.text(alphabet="0123456789+-*/()（）×÷ ab.,", max_size=90))
@settings(max_examples=400, deadline=None)
def test_any_text_either_has_an_exact_value_or_is_refused(text):
    try:
        value = evaluate(text)
    except ExpressionError:
        return
    python = text.translate(str.maketrans("（）×÷", "()*/")).replace(" ", "")
    exact = eval("".join(f"F({p})" if p.isdigit() else p for p in _tokens(python)), {"F": lambda n: Fraction(n)})
    assert value.value == exact


def _tokens(text):
    for digits, group in itertools.groupby(text, str.isdigit):
        joined = "".join(group)
        yield from [str(int(joined))] if digits else list(joined)


def test_countdown_accepts_exactly_what_brute_force_finds():
    problem = Problem("x", "countdown", "en", 1, "?", "", "", "countdown", {"numbers": [2, 3, 7], "target": 13}, "")
    found = set()
    for order in itertools.permutations((2, 3, 7)):
        for first, second in itertools.product("+-*/", repeat=2):
            for form in ("{}{}{}{}{}", "({}{}{}){}{}", "{}{}({}{}{})"):
                text = form.format(order[0], first, order[1], second, order[2])
                try:
                    right = eval(text) == 13
                except ZeroDivisionError:
                    right = False
                assert verify(problem, text) is right, text
                found |= {text} if right else set()
    assert "2*3+7" in found
    assert not verify(problem, "13")
    assert not verify(problem, "2*3+7+0")
    assert not verify(problem, "2*3+7=13")
    assert verify(problem, "２×３＋７")


def test_a_ballot_is_the_same_for_answers_that_say_the_same():
    problem = Problem("x", "countdown", "en", 1, "?", "", "", "countdown", {"numbers": [2, 3, 7], "target": 13}, "")
    assert ballot(problem, "2*3+7") == ballot(problem, " 7+(3×2)") != ballot(problem, "7+3+2")
    assert ballot(problem, "13") != ballot(problem, "2*3+7")
    letters = Problem("x", "gym_x", "en", 1, "?", "", "True", "text", {"value": "True"}, "")
    assert ballot(letters, " True ") == "True" != ballot(letters, "true")  # it is judged by the letter
    for text in HOSTILE:
        assert isinstance(ballot(problem, text), str)
    people = Problem("x", "knights", "en", 1, "?", "", "", "roles", {"values": ["knight", "knave"]}, "")
    assert ballot(people, "Knight, knave,") == ballot(people, "knight knave")
    sign = Problem("x", "gym_x", "en", 1, "?", "", "×", "text", {"value": "×"}, "")
    assert verify(sign, "×")
    assert not verify(sign, "+")
    listed = Problem("x", "sort", "en", 1, "?", "", "", "integers", {"values": [1, 2]}, "")
    assert ballot(listed, "1, 2") == ballot(listed, "1 2") != ballot(listed, "2 1")


ANSWERS = {
    "countdown": ({"numbers": [5, 2], "target": 3}, "52+-() ×３"),
    "integer": ({"value": 5}, "5-0 ,."),
    "integers": ({"values": [5, 2]}, "52 ,，"),
    "digits": ({"value": "05"}, "05 ,"),
    "roles": ({"values": ["knight"]}, "knightKN ,"),
    "boxed": ({"value": "50"}, "50.%\\/ -$"),
}


@pytest.mark.parametrize("verifier", ANSWERS)
@given(st.data())
@settings(deadline=None, max_examples=100)
def test_answers_that_share_a_vote_are_judged_alike(verifier, data):
    arguments, alphabet = ANSWERS[verifier]
    problem = Problem("x", "x", "en", 1, "?", "", "", verifier, arguments, "")
    texts = st.text(alphabet, max_size=4) | st.sampled_from(["5-2", "5", "5 2", "05", "knight", "50", r"50\%", "0.5"])
    space = st.sampled_from(["", " ", "\n" * 300, " " * 300 + "x", "　"])
    verdicts = {}
    for _ in range(20):
        text = data.draw(space) + data.draw(texts) + data.draw(space)
        assert verdicts.setdefault(ballot(problem, text), verify(problem, text)) == verify(problem, text), text


def test_every_pair_of_claims_is_judged_as_the_truth_table_says():
    for claims in itertools.product(CLAIMS, repeat=2):
        for first, second in itertools.product((True, False), repeat=2):
            says = CLAIMS[claims[0]](first, second), CLAIMS[claims[1]](second, first)
            assert ((first, second) in solutions(claims)) == (says == (first, second))


@pytest.mark.parametrize("people", range(2, 8))
def test_islanders_have_one_solution_which_the_search_finds_by_going_back_where_a_claim_fails(people):
    rng = Random(people)
    for _ in range(20):
        claims = islanders.draw(rng, people - 1)["claims"]
        tried = islanders.search(claims)
        assert islanders.solutions(claims) == [tried[-1][0]]
        for roles, speaker in tried[:-1]:
            wholes = [(*roles, *rest) for rest in itertools.product((True, False), repeat=people - len(roles))]
            assert all(islanders.holds(claims[speaker], whole) != whole[speaker] for whole in wholes)
        # Knight is tried before knave, and nothing is left out: what would come earlier begins as one that failed.
        for whole in itertools.product((True, False), repeat=people):
            if whole > tried[-1][0]:
                assert any(whole[: len(roles)] == roles for roles, _ in tried[:-1])


def test_islanders_claims_mean_what_they_say():
    numbers = {"claims": [islanders.Claim("if", (1, True), (0, False)), islanders.Claim("is", (0, False), (0, False))]}
    numbers["names"] = [0, 1]
    assert islanders.solutions(numbers["claims"]) == [(True, False)]
    english = islanders.write(numbers, "en", Random(0))
    assert "Amy says: if Bob is a knight then Amy is a knave. Bob says: Amy is a knave." in english.question
    assert english.chain == "Amy knight Bob knight: what Amy says does not fit; Bob knave: all fit"
    chinese = islanders.write(numbers, "zh", Random(0))
    assert "小明说：如果小红是骑士那么小明是骗子。小红说：小明是骗子。" in chinese.question
    assert (english.answer, chinese.answer) == ("knight knave", "骑士 骗子")


def test_the_wide_countdown_divides_without_remainder_and_has_the_numbers_of_tiny_zero():
    problems = generate(["countdown_wide"], LANGUAGES, 400, seed=0, split="train")
    assert {len(problem.arguments["numbers"]) for problem in problems} == {3, 4}
    assert max(max(problem.arguments["numbers"]) for problem in problems) > 90
    divided = [problem for problem in problems if "/" in problem.answer]
    assert divided
    for problem in divided:
        for left, right, result in re.findall(r"(\d+)/(\d+)=(\d+)", problem.chain):
            assert int(left) == int(right) * int(result)


def test_the_splits_are_disjoint_whatever_the_seeds_and_the_language():
    train = generate(EVERYTHING, LANGUAGES, 3000, seed=1, split="train")
    heldout = generate(EVERYTHING, LANGUAGES, 300, seed=2, split="heldout")
    assert not {p.question for p in train} & {p.question for p in heldout}
    assert not {p.content for p in train} & {p.content for p in heldout}
    # Families that tell the same sum in other words must not hand the chain over.
    solved = {(p.language, p.chain, p.answer) for p in train}
    assert not [
        p for p in heldout if (p.language, p.chain, p.answer) in solved and p.family in ("chain_sum", "word_sum")
    ]
    assert len({p.question for p in train}) == len({p.id for p in train}) == 3000
    assert {p.family for p in heldout} == set(EVERYTHING)


def test_generation_is_the_same_in_another_process_and_differs_by_seed():
    here = [p.question for p in generate(["countdown", "gcd"], ["zh"], 40, seed=3, split="train")]
    program = (
        "from stages.problems.registry import generate\n"
        "print('|'.join(p.question for p in generate(['countdown', 'gcd'], ['zh'], 40, seed=3, split='train')))"
    )
    there = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", program], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert there.stdout.strip().split("|") == here
    other = [p.question for p in generate(["countdown", "gcd"], ["zh"], 40, seed=4, split="train")]
    assert len(set(here) & set(other)) < 10  # neighbouring seeds share no stream


def test_asking_for_too_much_or_for_the_unknown_is_a_config_error():
    with pytest.raises(ConfigError, match="only"):
        generate(["chain_sum"], ["en"], 10_000, seed=0, split="heldout", levels=[1])
    with pytest.raises(ConfigError, match="sudoku"):
        generate(["sudoku"], ["en"], 1, seed=0, split="train")
    with pytest.raises(ConfigError, match="fr"):
        generate(["gcd"], ["fr"], 1, seed=0, split="train")
    with pytest.raises(ConfigError, match="level"):
        generate(["gcd"], ["en"], 1, seed=0, split="train", levels=[9])


def test_chains_speak_the_language_of_the_question():
    for problem in generate(EVERYTHING, LANGUAGES, 400, seed=5, split="train"):
        han = any("一" <= letter <= "鿿" for letter in problem.chain)
        assert han == (problem.language == "zh"), problem.chain


def test_problems_survive_a_file(tmp_path):
    problems = generate(EVERYTHING, LANGUAGES, 50, seed=6, split="train")
    assert write_problems(tmp_path / "train.jsonl", problems) == 50
    assert list(read_problems(tmp_path / "train.jsonl")) == problems
    assert set(VERIFIERS) >= {p.verifier for p in problems}
