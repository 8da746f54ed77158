"""The learner on a micro model: it learns a bandit, resumes to the last bit, and stands still when it should."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from stages.grpo import GrpoConfig
from stages.rl.learner import GrpoJob, learn
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
    (kept,) = (tmp_path / "scratch").glob("rollouts/*.parquet")
    replies = pq.read_table(kept).to_pylist()
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


def test_the_job_survives_pickling_and_its_config_a_round_trip(job, tmp_path):
    given = job(tmp_path)
    assert pickle.loads(pickle.dumps(given)) == given
    assert GrpoConfig.parse(json.loads(given.config.model_dump_json())) == given.config
