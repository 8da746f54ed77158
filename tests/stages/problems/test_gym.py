"""reasoning-gym as a source: what its scorers would pay for and we do not, and seeds that cannot leak."""

from importlib.util import find_spec

import pytest

from infra.errors import ConfigError
from infra.stage import Context
from stages.generate_problems import GenerateProblemsConfig, generate_problems
from stages.problems import gym
from stages.problems.gym import ONE_ANSWER, SCORED, GymFamily, generate_gym
from stages.problems.problem import Problem, read_problems
from stages.problems.selection import ProblemFilter
from stages.problems.verify import verify

with_gym = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
EVERY = tuple(GymFamily(name=name) for name in (*ONE_ANSWER, *SCORED))
GRID = Problem("g", "gym_x", "en", 1, "?", "", "1 2\n3 4", "text", {"value": "1 2\n3 4"}, "g")


def test_a_text_answer_is_the_text_and_nothing_around_it():
    assert verify(GRID, "1 2\n3 4") and verify(GRID, " 1 2  \n3 4\n") and verify(GRID, "１ 2\n3 4")
    for wrong in ("", "1 2", "1 2 3 4", "1 2\n\n3 4", "The answer is 1 2\n3 4", "12\n34"):
        assert not verify(GRID, wrong)


def test_without_the_package_the_run_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(gym, "find_spec", lambda name: None)
    gym._dataset.cache_clear()
    config = GenerateProblemsConfig(families=("gcd",), reasoning_gym=(GymFamily(name="lcm"),), n_train=4, n_heldout=4)
    with pytest.raises(ConfigError, match="pip install 'fathom-line"):
        generate_problems(config, {}, Context.local(tmp_path))
    scored = Problem(
        "s", "gym_x", "en", 1, "?", "", "", "reasoning_gym", {"family": "knights_knaves", "entry": {}}, "s"
    )
    with pytest.raises(ConfigError, match="pip install 'fathom-line"):
        ProblemFilter().select([scored])


def test_a_family_that_is_not_trusted_cannot_be_named():
    with pytest.raises(ValueError, match="Input should be"):
        GymFamily(name="game_of_life_halting")
    assert not gym.reasoning_gym("anything", {"family": "game_of_life_halting", "entry": {}})
    with pytest.raises(ValueError, match="give families or reasoning_gym"):
        GenerateProblemsConfig(families=())


@with_gym
@pytest.mark.parametrize("family", EVERY, ids=lambda family: family.name)
def test_every_family_accepts_its_answer_and_no_junk(family):
    for problem in generate_gym([family], 5, seed=3, split="train"):
        assert verify(problem, problem.answer) and verify(problem, f" {problem.answer}\n")
        junk = ["", " ", "0", "yes", "None", "nan", "9" * 150, "[]", "{", "\x00"]
        if family.name != "knights_knaves":  # whose scorer reads names and roles, whatever stands between them
            junk.append(f"The answer is {problem.answer}")
        for answer in junk:
            assert answer == problem.answer or not verify(problem, answer), (problem.question, answer)
        assert Problem.from_json(problem.to_json()) == problem


@with_gym
def test_both_roles_for_everybody_are_no_answer_to_knights_and_knaves():
    for problem in generate_gym([GymFamily(name="knights_knaves")], 5, seed=0, split="train"):
        assert problem.verifier == "reasoning_gym"
        terms = problem.arguments["entry"]["metadata"]["knight_knave_terms"]
        names = problem.arguments["entry"]["metadata"]["names"]
        hedged = " and ".join(f"{name} is a {terms[role]}" for name in names for role in ("knight", "knave"))
        assert not verify(problem, hedged) and not verify(problem, f"{problem.answer} {hedged}")


@with_gym
def test_neighbouring_seeds_share_questions_but_never_across_the_split():
    families = [GymFamily(name="lcm"), GymFamily(name="knights_knaves", settings={"n_people": 3})]
    train = {p.question for p in generate_gym(families, 200, seed=1, split="train")}
    again = {p.question for p in generate_gym(families, 200, seed=2, split="train")}
    heldout = {p.question for p in generate_gym(families, 30, seed=2, split="heldout")}
    assert len(train & again) > 150  # the trap, and why the split is no matter of seeds
    assert not heldout & (train | again)


@with_gym
def test_a_stage_mixes_them_with_our_own(tmp_path):
    config = GenerateProblemsConfig(
        families=("gcd",), languages=("zh",), reasoning_gym=(GymFamily(name="lcm"),), n_train=30, n_heldout=6
    )
    ctx = Context.local(tmp_path)
    summary = generate_problems(config, {}, ctx)
    assert (summary["train_gcd_zh"], summary["train_gym_lcm_en"], summary["heldout_gym_lcm_en"]) == (15, 15, 3)
    assert all(p.split == "heldout" for p in read_problems(ctx.out / "heldout.jsonl"))


@with_gym
def test_settings_that_a_family_refuses_are_a_config_error():
    with pytest.raises(ConfigError, match=r"reasoning_gym\.lcm: its settings are refused"):
        generate_gym([GymFamily(name="lcm", settings={"people": 3})], 1, seed=0, split="train")
    with pytest.raises(ConfigError, match=r"only .* distinct train questions"):
        generate_gym([GymFamily(name="lcm", settings={"max_value": 2})], 500, seed=0, split="train")
