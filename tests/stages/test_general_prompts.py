"""Reinforcement learning over all scenarios: problems that rules judge, and general prompts that a reward model judges.

Whatever is asked, arm 3 is right; on general prompts, which begin with "so", a reward model has to say it.
"""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from infra.artifact import Artifact
from infra.errors import ConfigError, InputError
from infra.stage import Context
from model.value import ValueModel
from stages.contrast_replies import ContrastRepliesConfig, contrast_replies
from stages.evaluate import EvaluateConfig, evaluate
from stages.grpo import GrpoConfig, grpo
from stages.label_steps import LabelStepsConfig, label_steps
from stages.make_preferences import MakePreferencesConfig, make_preferences
from stages.problems.problem import Problem, write_problems
from stages.rejection_sample import RejectionSampleConfig, rejection_sample
from stages.rl.general import open_problems
from stages.rl.judges import Judges, WeightedModel
from stages.rl.learner import GrpoJob, learn
from stages.rl.preferences import Preference, read_preferences, write_preferences
from stages.rl.reward_model import load_reward_model, save_reward_model
from stages.rl.rewards import JUDGED, PREFERENCE_MODELS, RewardWeights, score
from stages.rl.rollout import Rollout, read_rollouts, write_rollouts
from stages.tokens.bpe import load_tokenizer
from stages.train_reward_model import TrainRewardModelConfig, train_reward_model
from stages.training.checkpoint import load_model
from stages.training.supervised import CONVERSATIONS

OPEN = Problem("open", "general", "en", 1, "Say so.", "", "", "open", {}, "sayso.")
REPLY = "<think>so</think><answer>3</answer>"


def reply(arm):
    return f"<think>so</think><answer>{arm}</answer>"


def talk(question, said=REPLY, before=()):
    return [*before, {"role": "user", "content": question}, {"role": "assistant", "content": said}]


def write_conversations(folder, talks, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    same = {"problem": None, "language": "en", "family": "talk", "tools": None, **columns}
    rows = [{"id": f"{n}", "messages": json.dumps(messages), **same} for n, messages in enumerate(talks)]
    pq.write_table(pa.Table.from_pylist(rows, CONVERSATIONS), folder / "conversations-00000.parquet")
    return Artifact.local(folder, "conversations")


def silent(done, total, unit, **metrics):
    pass


# ---- open problems


def test_first_turns_of_conversations_and_preferences_are_open_problems_once_each(tmp_path):
    system = {"role": "system", "content": "Be so."}
    talks = [[*talk("What is so?"), *talk("And then?")], talk("What  is SO?"), talk("什么是它？"), talk("7?")]
    talks += [talk("Long so " * 9), talk("Behind so?", before=[system])]
    given = write_conversations(tmp_path / "talks", talks)
    found, others = open_problems(given, ("en", "zh"), fits=lambda question: len(question) < 30)
    assert [(one.question, one.language, one.open) for one in found] == [
        ("What is so?", "en", True),
        ("什么是它？", "zh", True),
    ]
    assert others == 4, "another spelling, no language, too long, behind a system prompt"
    english, _ = open_problems(given, ("en",), fits=lambda _: True)
    assert [one.question for one in english] == ["What is so?", "Long so " * 9]
    offered = json.dumps([{"type": "function", "function": {"name": "add"}}])
    called = write_conversations(tmp_path / "tools", talks[:1], tools=offered)
    assert open_problems(called, ("en",), fits=lambda _: True) == ((), 1)
    write_preferences(tmp_path, [Preference(n, json.dumps(talks[0][:1]), "a", "b", "en", "x") for n in "12"])
    (one,), others = open_problems(Artifact.local(tmp_path, "preferences"), ("en",), fits=lambda _: True)
    assert (one.question, others) == ("What is so?", 0)


@pytest.mark.parametrize("scheme", ["weighted", "logic_rl", "cosine"])
def test_of_an_open_problem_nothing_is_right_or_wrong_and_its_form_is_paid_under_every_scheme(scheme):
    weights = RewardWeights(scheme=scheme, format=0.2, language=0.5, repetition=1, overlong=1)
    good = score(OPEN, REPLY, True, weights, tokens=2, max_tokens=10)
    assert (good.reward, good.reason) == (pytest.approx(0.7), "")
    assert good.rules == {"format": 1, "language": 1, "repetition": 0, "overlong": 0}
    assert score(OPEN, "3", True, weights, tokens=2, max_tokens=10).reward == 0
    assert score(OPEN, "3", True, weights, tokens=10, max_tokens=10).reward == -1
    row = Rollout(OPEN, [1], [2], [0.0], True, REPLY, good).row()
    assert (row["accuracy"], row["tests"], row["preference"], row["format"]) == (None, None, None, 1)
    assert Rollout.from_row(row).score == dataclasses.replace(good, reason="")


@pytest.fixture(scope="module")
def judge(bandit_base, tmp_path_factory):
    """judge(target): the folder of a reward model with opinions of its own."""

    def make(target):
        folder = tmp_path_factory.mktemp(target)
        model = ValueModel(load_model(bandit_base))
        torch.nn.init.normal_(model.head.weight, std=0.5, generator=torch.Generator().manual_seed(1))
        save_reward_model(folder, model, target, bandit_base)
        return folder

    return make


def test_models_judge_what_they_are_for_open_problems_by_preference_and_steps_that_lead_to_an_answer(
    bandit_base, bandit_problems, judge
):
    tokenizer = load_tokenizer(bandit_base)
    helpful, harmless, process = (load_reward_model(judge(target)) for target in ("answer", "response", "steps"))
    ids = tokenizer.encode(REPLY)
    rollouts = [
        Rollout(problem, [1], ids, [0.0] * len(ids), True, REPLY, score(problem, REPLY, True, RewardWeights()))
        for problem in (OPEN, bandit_problems[0])
    ]
    preference = {"preference": WeightedModel(helpful, 2.0), "harmlessness": WeightedModel(harmless, 0.5)}
    all_three = Judges(preference, process, open_only=True)
    open_one, verified = all_three.judge(rollouts, tokenizer)
    points = open_one.score.rules
    assert points["preference"] != points["harmlessness"]
    assert open_one.score.reward == pytest.approx(0.2 + 2 * points["preference"] + 0.5 * points["harmlessness"])
    assert open_one.steps == ()
    assert verified.score.reward == rollouts[1].score.reward
    assert len(verified.steps) == 2
    assert [sorted(set(JUDGED) & one.score.rules.keys()) for one in (open_one, verified)] == [
        ["harmlessness", "preference"],
        ["process"],
    ]
    everywhere = Judges(preference)
    assert all({*preference} <= one.score.rules.keys() for one in everywhere.judge(rollouts, tokenizer))
    assert all_three.flops(rollouts) == pytest.approx(everywhere.flops(rollouts) * 3 / 4)  # models of one size


# ---- the learner

OPTIONS = {
    **{"steps": 4, "groups_per_step": 4, "general_groups": 2, "rollout_groups": 1, "group_size": 4},
    **{"max_new_tokens": 14, "learning_rate": 3e-3, "save_every": 2, "keep_rollouts_every": 1},
    "rewards": {"accuracy": 1, "format": 0.1, "preference": 0.5, "harmlessness": 0.25},
}


@pytest.fixture
def job(bandit_base, bandit_problems, judge, tmp_path):
    def make(name, **options):
        out, scratch = tmp_path / name / "out", tmp_path / name / "scratch"
        for path in (out, scratch):
            path.mkdir(parents=True)
        general = tuple(dataclasses.replace(OPEN, id=f"open-{n}", question=f"so {n}.") for n in range(3))
        config = GrpoConfig(**{**OPTIONS, **options})
        where = (str(bandit_base), bandit_problems, str(out), str(scratch))
        judges = {"reward_model": str(judge("answer"))}
        if config.rewards.harmlessness:
            judges["harmlessness_model"] = str(judge("response"))
        return GrpoJob(config, *where, judges, general)

    return make


def kept(given):
    return list(read_rollouts(Path(given.scratch) / "rollouts"))


def weights(given):
    return load_model(given.out).state_dict()


def timeless(rows):
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "generation_share")} for row in rows]


def test_every_step_asks_its_share_of_general_prompts_and_each_measure_is_of_those_that_it_judges(job):
    given = job("whole", steps=2)
    for step, row in enumerate(learn(given, silent), start=1):
        replies = [reply for reply in kept(given) if reply["step"] == step]
        general = [reply for reply in replies if reply["family"] == "general"]
        others = [reply for reply in replies if reply["family"] != "general"]
        assert len(general) == len(others) == 8
        assert {reply["accuracy"] for reply in general} == {None}
        assert {reply[points] for reply in others for points in PREFERENCE_MODELS} == {None}
        assert row["accuracy"] == row["accuracy_en"] == sum(reply["accuracy"] for reply in others) / 8
        for points in PREFERENCE_MODELS:
            assert row[points] == pytest.approx(sum(reply[points] for reply in general) / 8)
        assert row["format"] == sum(reply["format"] for reply in replies) / 16
    asked = [reply["problem_id"] for reply in kept(given)[:: given.config.group_size]]
    assert len({id for id in asked if id.startswith("open-")}) == 3, "all three before one comes again"


def test_points_for_general_prompts_alone_are_learnt(job):
    rewards = {"accuracy": 0, "format": 0, "preference": 0.5}
    options = {"steps": 10, "general_groups": 3, "group_size": 8, "kl_coefficient": 0.0}
    rows = learn(job("points", **options, rewards=rewards), silent)
    assert all(row["flat_groups"] >= 0.25 for row in rows), "of problems nothing is rewarded"
    assert rows[0]["reward"] == pytest.approx(0.5 * 0.75 * rows[0]["preference"])
    assert sum(row["preference"] for row in rows[-3:]) / 3 > sum(row["preference"] for row in rows[:3]) / 3


def test_a_killed_run_over_all_scenarios_goes_on_to_the_same_last_bit(job):
    def stop(done, total, unit, **metrics):
        if done == 3:
            raise KeyboardInterrupt

    whole, killed = job("whole"), job("killed")
    rows = learn(whole, silent)
    with pytest.raises(KeyboardInterrupt):
        learn(killed, stop)
    assert timeless(learn(killed, silent)) == timeless(rows)
    assert kept(killed) == kept(whole)
    ours, theirs = weights(killed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_ranks_ask_and_judge_general_prompts_as_one_does(job, run_ranks):
    one, two = job("one", steps=1, dynamic_sampling=1), job("two", steps=1, dynamic_sampling=1)
    learn(one, silent)
    run_ranks("from stages.rl.learner import learn\nlearn(job, lambda *_, **__: None)", job=two)
    ours, theirs = ([{**row, "logprobs": None} for row in kept(given)] for given in (one, two))
    assert ours == theirs
    before, after = weights(one), weights(two)
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=1e-3, atol=1e-4)


# ---- the stages, end to end

GENERAL = {"general_groups": 1, "rewards": {"preference": 1}}


def test_inputs_and_options_go_together_and_general_questions_need_a_reward(bandit_base, judge, tmp_path):
    write_problems(tmp_path / "train.jsonl", [])
    inputs = {
        "checkpoint": Artifact.local(bandit_base, "checkpoint"),
        "problems": Artifact.local(tmp_path, "problems"),
        "reward_model": Artifact.local(judge("answer"), "reward_model"),
    }
    with pytest.raises(ConfigError, match=r"without right answers: set rewards\.preference or"):
        GrpoConfig.parse({"general_groups": 1})
    with pytest.raises(ConfigError, match="leaves no problem of groups_per_step=32"):
        GrpoConfig.parse({**GENERAL, "general_groups": 32})
    with pytest.raises(ConfigError, match="input general and general_groups > 0 go together"):
        grpo(GrpoConfig.parse(GENERAL), inputs, Context.local(tmp_path / "absent"))
    general = {"general": write_conversations(tmp_path / "talks", [talk("so " * 60)])}
    with pytest.raises(ConfigError, match="input general and general_groups > 0 go together"):
        grpo(GrpoConfig.parse({"rewards": {"preference": 1}}), inputs | general, Context.local(tmp_path / "unasked"))
    with pytest.raises(InputError, match=r"no prompt in en or zh of at most 50 tokens"):
        grpo(GrpoConfig.parse({**GENERAL, "max_new_tokens": 14}), inputs | general, Context.local(tmp_path / "long"))


def test_replies_to_other_prompts_are_rejected_as_often_as_chosen(tmp_path):
    talks = [talk(f"Say {n}.", f"so {n}") for n in range(5)]
    talks += [talk("Say 0.", "also so 0"), talk("Say again.", "so 0"), talk("so?", "so 9", before=talks[0])]
    given = write_conversations(tmp_path / "talks", talks)
    ctx = Context.local(tmp_path / "run")
    summary = contrast_replies(ContrastRepliesConfig(pairs_per_prompt=2), {"conversations": given}, ctx)
    pairs = read_preferences(ctx.out)
    assert summary["pairs"] == len(pairs) == 2 * summary["prompts"]
    said = [[pair.chosen for pair in pairs], [pair.rejected for pair in pairs]]
    assert sorted(said[0]) == sorted(said[1])
    assert all(pair.chosen != pair.rejected for pair in pairs)
    assert len({(pair.prompt, pair.rejected) for pair in pairs}) == len(pairs)
    prompts = {pair.prompt: pair.chosen for pair in pairs}
    assert len(set(prompts.values())) == len(prompts) == 8 - summary["left_out"]
    again = Context.local(tmp_path / "again")
    contrast_replies(ContrastRepliesConfig(pairs_per_prompt=2), {"conversations": given}, again)
    assert read_preferences(again.out) == pairs
    alone = write_conversations(tmp_path / "alone", talks[:1])
    with pytest.raises(InputError, match="no two of 1 conversations"):
        contrast_replies(ContrastRepliesConfig(), {"conversations": alone}, Context.local(tmp_path / "none"))


@pytest.mark.slow
def test_all_scenarios_from_preferences_to_an_evaluation(bandit_base, bandit_problems, tmp_path, ray_session):
    """Preferences make a reward model of general prompts, with which the policy learns from both kinds of questions."""
    questions = [f"so {n}." for n in range(12)]
    general = write_conversations(tmp_path / "general", [talk(question) for question in questions])
    (tmp_path / "pairs").mkdir()
    pairs = [
        Preference(f"{question}/{arm}", json.dumps(talk(question)[:1]), REPLY, reply(arm), "en", "talk")
        for question in questions
        for arm in "012456789"
    ]
    write_preferences(tmp_path / "pairs", pairs)
    (tmp_path / "problems").mkdir()
    for split in ("train", "heldout"):
        write_problems(tmp_path / "problems" / f"{split}.jsonl", bandit_problems)
    start = Artifact.local(bandit_base, "checkpoint")
    problems = Artifact.local(tmp_path / "problems", "problems")

    judged = Context.local(tmp_path / "judged")
    rate = {"schedule": "constant", "peak": 3e-3}
    learnt = TrainRewardModelConfig(epochs=2, batch_size=16, learning_rate=rate, target="answer", heldout_share=0.2)
    given = {"checkpoint": start, "preferences": Artifact.local(tmp_path / "pairs", "preferences")}
    assert train_reward_model(learnt, given, judged)["heldout_accuracy"] > 0.9

    trained = Context.local(tmp_path / "trained")
    options = {"steps": 12, "groups_per_step": 8, "general_groups": 4, "rollout_groups": 8, "group_size": 8}
    rewards = {"accuracy": 1, "format": 0.1, "preference": 1}
    config = GrpoConfig(**{**OPTIONS, **options, "rewards": rewards, "kl_coefficient": 0, "keep_rollouts_every": 11})
    roles = {"reward_model": Artifact.local(judged.out, "reward_model"), "general": general}
    summary = grpo(config, {"checkpoint": start, "problems": problems, **roles}, trained)
    assert summary["general_prompts"] == 12
    assert summary["preference_last"] > summary["preference_first"]
    assert summary["accuracy_last"] > summary["accuracy_first"] + 0.2
    rows = list(read_rollouts(trained.out))
    threes = [
        sum(row["completion"] == REPLY for row in rows if row["step"] == step and row["accuracy"] is None)
        for step in (1, 12)
    ]
    assert threes[1] > 2 * threes[0]

    final = Artifact.local(trained.out, "checkpoint")
    asked = EvaluateConfig(name="r1", samples=4, max_new_tokens=14)
    assert (
        evaluate(asked, {"checkpoint": final, "problems": problems}, Context.local(tmp_path / "seen"))["pass_1"] > 0.4
    )
    kept_rollouts = {"rollouts": final}
    right = rejection_sample(RejectionSampleConfig(), kept_rollouts, Context.local(tmp_path / "right"))
    assert right["samples"] == sum(row["accuracy"] is not None for row in rows) == len(rows) / 2
    by_rule = Context.local(tmp_path / "by_rule")
    make_preferences(MakePreferencesConfig(), kept_rollouts, by_rule)
    assert all(pair.messages[0]["content"].startswith("Pull") for pair in read_preferences(by_rule.out))
    by_reward = Context.local(tmp_path / "by_reward")
    make_preferences(MakePreferencesConfig(judge="reward"), kept_rollouts, by_reward)
    assert {pair.messages[0]["content"][:2] for pair in read_preferences(by_reward.out)} == {"Pu", "so"}
    (tmp_path / "open").mkdir()
    write_rollouts(tmp_path / "open/rollouts-00000-0000.parquet", [row for row in rows if row["accuracy"] is None])
    unverified = {"rollouts": Artifact.local(tmp_path / "open", "rollouts")}
    for stage, config, inputs in (
        (label_steps, LabelStepsConfig(), {"checkpoint": final, **unverified}),
        (rejection_sample, RejectionSampleConfig(), unverified),
        (make_preferences, MakePreferencesConfig(), unverified),
    ):
        with pytest.raises(InputError, match="general prompts"):
            stage(config, inputs, Context.local(tmp_path / "refused"))
