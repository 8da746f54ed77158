"""The learner on a micro model: it learns a bandit under every option, and stands still when it should."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch

from infra.errors import ConfigError
from model.value import ValueModel
from stages.grpo import GrpoConfig
from stages.rl.group_rewards import brevity
from stages.rl.learner import learn
from stages.rl.mismatch import EngineMismatch
from stages.rl.policy_loss import PolicyObjective
from stages.rl.reward_model import load_reward_model, save_reward_model
from stages.rl.rollout import grouped, read_rollouts
from stages.rl.update import Update
from stages.training.checkpoint import load_model
from stages.training.distributed import Ranks
from stages.training.resume import ResumeStore


def silent(done, total, unit, **metrics):
    pass


def weights(folder):
    return load_model(folder).state_dict()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_needs_twenty_bytes_a_parameter_beside_activations_and_cache(bandit_base, precision):
    model = load_model(bandit_base)
    update = Update(GrpoConfig(precision=precision), model, None, 0, Ranks(0, 1, torch.device("cpu")))
    update.policy.bucket.zero()
    low = [weight for weight in model.parameters() if weight.dtype == torch.bfloat16]
    held = [*model.parameters(), *update.reference.parameters(), update.policy.bucket._flat]
    held += [value for state in update.policy.optimizer.state.values() for value in state.values()]
    held += low  # autograd's gradients, until the bucket has collected them
    total = sum(tensor.nbytes for tensor in held) / sum(weight.numel() for weight in model.parameters())
    assert total == pytest.approx(20, rel=0.01)  # README and flows/recipes/reproductions.py count on it


def test_reward_rises_on_a_bandit(job, tmp_path):
    rows = learn(job(tmp_path, steps=30, group_size=16, learning_rate=3e-3, kl_coefficient=0.0), silent)
    assert sum(row["accuracy"] for row in rows[:3]) / 3 < 0.3
    assert sum(row["accuracy"] for row in rows[-3:]) / 3 > 0.6
    assert rows[-1]["entropy"] < rows[0]["entropy"]
    assert rows[-1]["flops"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "staleness"), [("fp32", 0), ("bf16", 0), ("bf16", 1)])
def test_reward_rises_on_a_gpu(job, tmp_path, precision, staleness):
    """Decoding replays recorded steps of weights that learn; exploring one step late has a stream of its own."""
    options = {"precision": precision, "staleness": staleness, "importance_cap": 2.0, "kl_coefficient": 0.0}
    rows = learn(job(tmp_path, steps=40, group_size=16, learning_rate=3e-3, **options), silent)
    assert sum(row["accuracy"] for row in rows[:3]) / 3 < 0.3
    assert sum(row["accuracy"] for row in rows[-3:]) / 3 > 0.6
    if not staleness:
        assert max(row["mismatch_kl"] for row in rows) < (1e-6 if precision == "fp32" else 1e-2)


def test_with_learning_rate_zero_nothing_moves_and_all_three_policies_agree(job, bandit_base, tmp_path):
    for row in learn(job(tmp_path, steps=2, learning_rate=0.0, updates_per_exploration=2), silent):
        assert row["kl"] <= 1e-5
        assert row["max_ratio"] == pytest.approx(1, abs=1e-5)
        assert row["clip_fraction"] == 0
        assert row["mismatch_kl"] <= 1e-5
        assert row["mismatch_max_ratio"] == pytest.approx(1, abs=1e-5)
        assert row["loss"] != 0 or row["flat_groups"] == 1
    before, after = weights(bandit_base), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_steps_row_reports_every_rule_and_the_signs_of_reasoning(job, tmp_path):
    weights = {"format": 0.2, "repetition": 0.3, "overlong": 0.7, "overlong_margin": 1.0}
    (row,) = learn(job(tmp_path, steps=1, rewards=weights), silent)
    assert 0 < row["overlong"] < 1  # every token counts when the margin is the whole limit
    earned = row["accuracy"] + 0.2 * row["format"]
    assert row["reward"] == pytest.approx(earned - 0.3 * row["repetition"] - 0.7 * row["overlong"])
    replies = list(read_rollouts(tmp_path / "scratch/rollouts"))
    assert row["overlong"] == pytest.approx(sum(reply["tokens"] for reply in replies) / len(replies) / 14)
    assert (row["reflections"], row["verification"], row["backtracking"]) == (0, 0, 0)  # its chains say "so"


def test_replies_are_paid_for_brevity_within_their_groups(job, tmp_path):
    (row,) = learn(job(tmp_path, steps=1, rewards={"format": 0.2, "brevity": 0.4}), silent)
    groups = list(grouped(read_rollouts(tmp_path / "scratch/rollouts")))
    points = [brevity([r["tokens"] for r in group], [r["accuracy"] == 1 for r in group]) for group in groups]
    assert len({reply["tokens"] for group in groups for reply in group}) > 1
    paid = [0.4 * point for group in points for point in group]
    rules = [reply["accuracy"] + 0.2 * reply["format"] for group in groups for reply in group]
    rewards = [reply["reward"] for group in groups for reply in group]
    assert rewards == pytest.approx([rule + one for rule, one in zip(rules, paid, strict=True)])
    assert row["reward"] == pytest.approx(sum(rewards) / len(rewards))


def test_multi_token_prediction_modules_come_back_unchanged(job, bandit_base, tmp_path):
    learn(job(tmp_path, steps=2), silent)
    before, after = weights(bandit_base), weights(tmp_path / "out")
    assert any(name.startswith("mtp.") for name in before)
    for name in before:
        if name.startswith("mtp."):
            assert torch.equal(before[name], after[name])
    assert not torch.equal(before["head.weight"], after["head.weight"])


@pytest.mark.parametrize("loss", ["dr_grpo", "dapo", "gspo", "cispo", "rloo", "ppo"])
def test_reward_rises_under_every_loss(job, tmp_path, loss):
    options = {"loss": loss, "kl_coefficient": 0.0, "importance_cap": 2.0}
    rows = learn(job(tmp_path, steps=20, group_size=16, updates_per_exploration=2, **options), silent)
    assert sum(row["accuracy"] for row in rows[-3:]) / 3 > sum(row["accuracy"] for row in rows[:3]) / 3 + 0.2


def test_ppos_critic_learns_what_replies_are_worth_and_is_saved_with_the_policy(job, tmp_path):
    """Of a policy that does not move and nearly always keeps the form, each token's value is the point for it."""
    options = {"loss": "ppo", "rewards": {"accuracy": 0, "format": 1}, "learning_rate": 0.0, "kl_coefficient": 0.0}
    critic = {"learning_rate": 1e-2, "clip": 1.0, "gae_lambda": 1}
    given = job(tmp_path, **options, steps=16, save_every=16, critic=critic)
    rows = learn(given, silent)
    assert rows[0]["value_loss"] == pytest.approx(0.5 * rows[0]["format"], rel=0.1)  # a new critic says 0
    assert rows[-1]["value_loss"] < 0.1 * rows[0]["value_loss"]
    state = ResumeStore(tmp_path / "scratch/resume").load()
    assert state["update"]["critic"]["model"]["head.weight"].abs().max() > 0
    before, after = weights(given.checkpoint), weights(given.out)
    assert all(torch.equal(before[name], after[name]) for name in before)


def judge(folder, base, target, seed=0):
    """A reward model with opinions of its own."""
    model = ValueModel(load_model(base))
    torch.nn.init.normal_(model.head.weight, std=0.5, generator=torch.Generator().manual_seed(seed))
    save_reward_model(folder, model, target, base)
    return str(folder)


def test_the_points_of_a_reward_model_are_learnt_and_kept(job, bandit_base, tmp_path):
    folder = judge(tmp_path / "judge", bandit_base, "answer")
    rewards = {"accuracy": 0, "format": 0, "preference": 0.5}
    given = job(tmp_path, steps=10, rewards=rewards, kl_coefficient=0.0, keep_rollouts_every=9)
    rows = learn(dataclasses.replace(given, judges={"reward_model": folder}), silent)
    assert sum(row["preference"] for row in rows[-3:]) / 3 > sum(row["preference"] for row in rows[:3]) / 3
    assert rows[0]["reward"] == pytest.approx(0.5 * rows[0]["preference"])
    kept = [row for row in read_rollouts(tmp_path / "scratch/rollouts") if row["step"] == 1]
    turns = [(("user", row["prompt"]), ("assistant", row["completion"])) for row in kept]
    points = load_reward_model(folder).score([[{"role": r, "content": c} for r, c in turn] for turn in turns])
    assert [row["preference"] for row in kept] == pytest.approx(points, abs=1e-4)
    assert len(set(points)) > 3


def test_process_supervision_learns_what_a_process_model_rewards(job, bandit_base, tmp_path):
    folder = judge(tmp_path / "judge", bandit_base, "steps")
    options = {"rewards": {"accuracy": 0, "format": 0}, "supervision": "process", "kl_coefficient": 0.0}
    given = job(tmp_path, steps=10, keep_rollouts_every=9, **options)
    rows = learn(dataclasses.replace(given, judges={"process_reward_model": folder}), silent)
    assert sum(row["process"] for row in rows[-3:]) / 3 > sum(row["process"] for row in rows[:3]) / 3
    assert rows[0]["reward"] == 0
    for row in read_rollouts(tmp_path / "scratch/rollouts"):
        assert row["step_ends"][-1] == row["tokens"] - 1
        assert row["process"] == pytest.approx(sum(row["step_rewards"]) / len(row["step_rewards"]))


@pytest.mark.parametrize("loss", ["grpo", "ppo"])
def test_the_credit_of_a_step_changes_what_is_learnt_and_not_what_was_said(loss, job, bandit_base, tmp_path):
    folder = judge(tmp_path / "judge", bandit_base, "steps")
    rows, kept = {}, {}
    for credit in ("sum", "progress"):
        options = {"supervision": "process", "step_credit": credit, "loss": loss}
        given = job(tmp_path / credit, steps=2, keep_rollouts_every=1, **options)
        rows[credit] = learn(dataclasses.replace(given, judges={"process_reward_model": folder}), silent)
        kept[credit] = [row for row in read_rollouts(tmp_path / credit / "scratch/rollouts") if row["step"] == 1]
    assert kept["sum"] == kept["progress"]
    assert rows["sum"][0]["accuracy"] == rows["progress"][0]["accuracy"]
    assert rows["sum"][0]["gradient_norm"] != rows["progress"][0]["gradient_norm"]


def test_a_mismatch_past_the_limit_ends_the_run_before_anything_is_learnt(job, tmp_path):
    with pytest.raises(EngineMismatch, match=r"step 1: .*past max_mismatch_kl=1e-30.*importance_cap"):
        learn(job(tmp_path, max_mismatch_kl=1e-30), silent)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_engine_is_measured_also_where_all_replies_earn_the_same(job, bandit_base, tmp_path):
    nothing = {"accuracy": 0, "format": 0}
    (row,) = learn(job(tmp_path, steps=1, rewards=nothing), silent)
    assert row["flat_groups"] == 1
    assert 1 < row["mismatch_max_ratio"] < 1 + 1e-5
    before, after = weights(bandit_base), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(EngineMismatch):
        learn(job(tmp_path / "strict", steps=1, rewards=nothing, max_mismatch_kl=1e-30), silent)


STALE = {"staleness": 1, "importance_cap": 2.0}


def test_stale_replies_are_those_of_the_weights_one_update_back(job, tmp_path):
    """The first two steps explore with the weights of the start: what they reply does not depend on what is learnt."""
    fast = learn(job(tmp_path / "fast", **STALE, steps=3, keep_rollouts_every=1), silent)
    still = learn(job(tmp_path / "still", **STALE, steps=3, keep_rollouts_every=1, learning_rate=0.0), silent)
    assert [row["staleness"] for row in fast] == [0, 1, 1]
    ours, theirs = (list(read_rollouts(tmp_path / name / "scratch/rollouts")) for name in ("fast", "still"))
    assert {row["step"] for row, other in zip(ours, theirs, strict=True) if row != other} == {3}
    assert fast[0]["mismatch_kl"] < 1e-5 < fast[1]["mismatch_kl"]
    assert still[1]["mismatch_kl"] < 1e-5


def test_reward_rises_with_stale_replies(job, tmp_path):
    rows = learn(job(tmp_path, steps=20, group_size=16, kl_coefficient=0.0, **STALE), silent)
    assert sum(row["accuracy"] for row in rows[-3:]) / 3 > sum(row["accuracy"] for row in rows[:3]) / 3 + 0.2


@pytest.mark.parametrize("options", [{"loss": "ppo"}, STALE], ids=["ppo", "stale"])
def test_bf16_weights_and_what_explores_beside_them_survive_a_kill_to_the_bit(job, tmp_path, options):
    whole, killed = (job(tmp_path / name, steps=4, precision="bf16", **options) for name in ("whole", "killed"))

    def stop(done, total, unit, **metrics):
        if done == 3:
            raise KeyboardInterrupt

    learn(whole, silent)
    with pytest.raises(KeyboardInterrupt):
        learn(killed, stop)
    learn(killed, silent)
    ours, theirs = weights(killed.out), weights(whole.out)
    assert {tensor.dtype for tensor in theirs.values() if tensor.is_floating_point()} == {torch.float32}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_online_rft_learns_from_right_replies_alone(job, tmp_path):
    rewards = {"accuracy": 1, "format": 0, "language": 0}
    rows = learn(job(tmp_path, steps=12, loss="online_rft", rewards=rewards, kl_coefficient=0.0), silent)
    assert rows[-1]["accuracy"] > rows[0]["accuracy"]


def test_dynamic_sampling_replaces_groups_without_contrast_by_questions_not_yet_asked(job, tmp_path):
    """Groups of two without a format reward: most are wrong twice. Of ten questions four are asked, six are spare."""
    options = {"steps": 2, "group_size": 2, "rewards": {"accuracy": 1, "format": 0}, "keep_rollouts_every": 1}
    rows = learn(job(tmp_path, dynamic_sampling=9, **options), silent)
    for step, row in enumerate(rows, start=1):
        asked = [group for group in grouped(read_rollouts(tmp_path / "scratch/rollouts")) if group[0]["step"] == step]
        problems = [group[0]["problem_id"] for group in asked]
        useful = sum(group[0]["reward"] != group[1]["reward"] for group in asked)
        assert [group[0]["group"] for group in asked] == list(range(len(asked)))
        assert len(set(problems)) == len(problems) > 4
        assert useful == 4 or len(problems) == 10
        assert row["flat_groups"] == pytest.approx(1 - useful / len(problems))


LEARN = """
from stages.rl.learner import learn

learn(job, lambda *_, **__: None)
"""


DYNAMIC = {"dynamic_sampling": 9, "group_size": 2, "rewards": {"accuracy": 1, "format": 0}}


@pytest.mark.parametrize(
    ("options", "groups"), [(DYNAMIC, 9), pytest.param({"loss": "ppo", "group_size": 4}, 8, marks=pytest.mark.slow)]
)
def test_two_ranks_explore_and_learn_what_one_does(job, run_ranks, tmp_path, options, groups):
    """The first step explores with the same weights; what is learnt differs by the rounding of sums alone."""
    common = {"steps": 2, "keep_rollouts_every": 1, "rollout_groups": 1, **options}
    one, two = (job(tmp_path / name, **common) for name in ("one", "two"))
    learn(one, silent)
    run_ranks(LEARN, job=two)
    ours, theirs = (
        [{**row, "logprobs": None} for row in read_rollouts(Path(job.scratch) / "rollouts")] for job in (one, two)
    )
    assert len(ours) >= groups * one.config.group_size  # eight groups are asked for; dynamic sampling replaces some
    assert ours == theirs
    before, after = weights(one.out), weights(two.out)
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=1e-3, atol=1e-4)


def test_dynamic_sampling_is_bounded_and_off_it_asks_nothing_more(job, tmp_path):
    options = {"steps": 1, "group_size": 2, "rewards": {"accuracy": 0, "format": 0}, "keep_rollouts_every": 1}
    for rounds, groups in ((0, 4), (1, 8), (2, 10), (9, 10)):  # no reward at all: every group lacks contrast
        folder = tmp_path / str(rounds)
        (row,) = learn(job(folder, dynamic_sampling=rounds, **options), silent)
        assert len(list(read_rollouts(folder / "scratch/rollouts"))) == groups * 2
        assert (row["loss"], row["flat_groups"]) == (0, 1)


def test_the_objective_is_the_losses_own_but_for_what_the_config_sets():
    assert GrpoConfig().objective == PolicyObjective(kl_coefficient=0.001)
    assert GrpoConfig(clip=0.3).objective == PolicyObjective(0.3, 0.3, kl_coefficient=0.001)
    assert GrpoConfig(clip_high=0.28).objective == PolicyObjective(0.2, 0.28, kl_coefficient=0.001)
    dapo = GrpoConfig(loss="dapo", kl_coefficient=0, kl_estimator="k2").objective
    assert dapo == PolicyObjective(0.2, 0.28, mean="token", kl="k2")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss": "online_rft"}, "accuracy 1"),
        ({"loss": "reinforce"}, "loss"),
        ({"loss": "ppo", "dynamic_sampling": 2}, "dynamic_sampling"),
        ({"critic": {"gae_lambda": 0.9}}, "set loss to ppo"),
        ({"staleness": 1}, "importance_cap"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options, says):
    with pytest.raises(ConfigError, match=says):
        GrpoConfig.parse(options)


def test_the_job_survives_pickling_and_its_config_a_round_trip(job, tmp_path):
    given = job(tmp_path)
    assert pickle.loads(pickle.dumps(given)) == given
    assert GrpoConfig.parse(json.loads(given.config.model_dump_json())) == given.config
