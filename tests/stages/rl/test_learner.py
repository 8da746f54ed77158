"""The learner on a micro model: it learns a bandit, resumes to the last bit, and stands still when it should."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infra.errors import ConfigError
from stages.grpo import GrpoConfig
from stages.rl.learner import GrpoJob, learn
from stages.rl.policy_loss import PolicyObjective
from stages.rl.rollout import grouped, read_rollouts
from stages.training.checkpoint import load_model


@pytest.fixture
def job(bandit_base, bandit_problems):
    def make(folder, **changes):
        out, scratch = folder / "out", folder / "scratch"
        for path in (out, scratch):
            path.mkdir(parents=True, exist_ok=True)
        options = {
            **{"steps": 6, "groups_per_step": 4, "rollout_groups": 2, "group_size": 8, "max_new_tokens": 14},
            **{"learning_rate": 3e-3, "kl_coefficient": 0.01, "save_every": 2, "keep_rollouts_every": 5},
            **changes,
        }
        return GrpoJob(GrpoConfig(**options), str(bandit_base), bandit_problems, str(out), str(scratch))

    return make


def silent(done, total, unit, **metrics):
    pass


def weights(folder):
    return load_model(folder).state_dict()


def test_reward_rises_on_a_bandit(job, tmp_path):
    rows = learn(job(tmp_path, steps=30, group_size=16, learning_rate=3e-3, kl_coefficient=0.0), silent)
    assert sum(row["accuracy"] for row in rows[:3]) / 3 < 0.3
    assert sum(row["accuracy"] for row in rows[-3:]) / 3 > 0.6
    assert rows[-1]["entropy"] < rows[0]["entropy"]
    assert rows[-1]["flops"] > 0


def test_a_killed_run_resumes_to_the_same_last_bit(job, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rows = learn(job(whole, reference_renew_every=3), silent)
    request = tmp_path / "job.pickle"
    request.write_bytes(pickle.dumps(job(killed, reference_renew_every=3)))
    program = (
        "import os, pickle, signal, sys\n"
        "from stages.rl.learner import learn\n"
        "def report(done, *rest, **metrics):\n"
        "    if done == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"learn(pickle.load(open({str(request)!r}, 'rb')), report)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], check=False, cwd=Path(__file__).parents[3])
    assert result.returncode == -9
    assert not (killed / "out" / "model.safetensors").exists()
    resumed = []
    again = learn(pickle.loads(request.read_bytes()), lambda done, *rest, **metrics: resumed.append(done))
    assert resumed in ([5, 6], [3, 4, 5, 6])  # from the state of step 4, or of 2 if 4 was still being written
    ours, theirs = weights(whole / "out"), weights(killed / "out")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    timing = ("tokens_per_second", "generation_share")
    assert [{**row, **dict.fromkeys(timing)} for row in again] == [{**row, **dict.fromkeys(timing)} for row in rows]


def test_with_learning_rate_zero_nothing_moves_and_all_three_policies_agree(job, bandit_base, tmp_path):
    for row in learn(job(tmp_path, steps=2, learning_rate=0.0, updates_per_exploration=2), silent):
        assert row["kl"] <= 1e-5
        assert row["max_ratio"] == pytest.approx(1, abs=1e-5)
        assert row["clip_fraction"] == 0
        assert row["mismatch_kl"] <= 1e-5
        assert row["mismatch_max_ratio"] == pytest.approx(1, abs=1e-3)
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


def test_multi_token_prediction_modules_come_back_unchanged(job, bandit_base, tmp_path):
    learn(job(tmp_path, steps=2), silent)
    before, after = weights(bandit_base), weights(tmp_path / "out")
    assert any(name.startswith("mtp.") for name in before)
    for name in before:
        if name.startswith("mtp."):
            assert torch.equal(before[name], after[name])
    assert not torch.equal(before["head.weight"], after["head.weight"])


@pytest.mark.parametrize("loss", ["dr_grpo", "dapo", "gspo", "cispo", "rloo"])
def test_reward_rises_under_every_loss(job, tmp_path, loss):
    options = {"loss": loss, "kl_coefficient": 0.0, "importance_cap": 2.0}
    rows = learn(job(tmp_path, steps=20, group_size=16, updates_per_exploration=2, **options), silent)
    assert sum(row["accuracy"] for row in rows[-3:]) / 3 > sum(row["accuracy"] for row in rows[:3]) / 3 + 0.2


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
        ({"loss": "ppo"}, "loss"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options, says):
    with pytest.raises(ConfigError, match=says):
        GrpoConfig.parse(options)


def test_the_job_survives_pickling_and_its_config_a_round_trip(job, tmp_path):
    given = job(tmp_path)
    assert pickle.loads(pickle.dumps(given)) == given
    assert GrpoConfig.parse(json.loads(given.config.model_dump_json())) == given.config
