"""The learner on a micro model: it learns a bandit, resumes to the last bit, and stands still when it should."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer
from stages.grpo import GrpoConfig
from stages.problems.problem import Problem
from stages.rl.learner import GrpoJob, learn
from stages.tokens.bpe import train
from stages.tokens.chat_template import render
from stages.training.checkpoint import load_model, save_model

ARMS = "0123456789"


def conversation(problem, reply):
    return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": reply}]


def bandit(digit):
    """Whatever is asked, arm 3 pays."""
    return Problem(f"arm-{digit}", "bandit", "en", 1, f"Pull {digit}.", "so", "3", "digits", {"value": "3"}, digit)


@pytest.fixture(scope="session")
def bandit_base(tmp_path_factory):
    """A micro model with MoE, MLA and MTP that knows the reply format and answers with any digit alike."""
    folder = tmp_path_factory.mktemp("bandit")
    tokenizer = train(["so Pull 0123456789." * 3], 280, digits="single", min_frequency=1)
    tokenizer.save(folder)
    torch.manual_seed(0)
    config = ModelConfig(
        **{"vocab_size": tokenizer.vocab_size, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64},
        **{"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "init_std": 0.05},
        **{"n_dense_layers": 1, "n_routed_experts": 4, "n_activated_experts": 2, "n_shared_experts": 1, "moe_d_ff": 16},
        **{"max_position": 64, "n_mtp": 1},
    )
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = [
        render(conversation(bandit(a), f"<think>so</think><answer>{b}</answer>"), tokenizer)[0]
        for a in ARMS
        for b in ARMS
    ]
    tokens_BT = torch.tensor(rows)
    for _ in range(60):
        loss = -model(tokens_BT[:, :-1]).log_probs(tokens_BT[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(folder, model, None)
    return folder


def job(base, folder, **changes):
    out, scratch = folder / "out", folder / "scratch"
    for path in (out, scratch):
        path.mkdir(parents=True, exist_ok=True)
    options = {
        **{"steps": 6, "groups_per_step": 4, "rollout_groups": 2, "group_size": 8, "max_new_tokens": 14},
        **{"learning_rate": 3e-3, "kl_coefficient": 0.01, "save_every": 2, "keep_rollouts_every": 5},
        **changes,
    }
    return GrpoJob(GrpoConfig(**options), str(base), tuple(map(bandit, ARMS)), str(out), str(scratch))


def silent(done, total, unit, **metrics):
    pass


def weights(folder):
    return load_model(folder).state_dict()


def test_reward_rises_on_a_bandit(bandit_base, tmp_path):
    rows = learn(job(bandit_base, tmp_path, steps=30, group_size=16, learning_rate=3e-3, kl_coefficient=0.0), silent)
    assert sum(row["accuracy"] for row in rows[:3]) / 3 < 0.3
    assert sum(row["accuracy"] for row in rows[-3:]) / 3 > 0.6
    assert rows[-1]["entropy"] < rows[0]["entropy"]
    assert rows[-1]["flops"] > 0


def test_a_killed_run_resumes_to_the_same_last_bit(bandit_base, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rows = learn(job(bandit_base, whole, reference_renew_every=3), silent)
    request = tmp_path / "job.pickle"
    request.write_bytes(pickle.dumps(job(bandit_base, killed, reference_renew_every=3)))
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
    assert resumed == [5, 6]  # from the state of step 4
    ours, theirs = weights(whole / "out"), weights(killed / "out")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    timing = ("tokens_per_second", "generation_share")
    assert [{**row, **dict.fromkeys(timing)} for row in again] == [{**row, **dict.fromkeys(timing)} for row in rows]


def test_with_learning_rate_zero_nothing_moves_and_all_three_policies_agree(bandit_base, tmp_path):
    for row in learn(job(bandit_base, tmp_path, steps=2, learning_rate=0.0, updates_per_exploration=2), silent):
        assert row["kl"] <= 1e-5
        assert row["max_ratio"] == pytest.approx(1, abs=1e-5)
        assert row["clip_fraction"] == 0
        assert row["mismatch_kl"] <= 1e-5
        assert row["mismatch_max_ratio"] == pytest.approx(1, abs=1e-3)
        assert row["loss"] != 0 or row["flat_groups"] == 1
    before, after = weights(bandit_base), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_multi_token_prediction_modules_come_back_unchanged(bandit_base, tmp_path):
    learn(job(bandit_base, tmp_path, steps=2), silent)
    before, after = weights(bandit_base), weights(tmp_path / "out")
    assert any(name.startswith("mtp.") for name in before)
    for name in before:
        if name.startswith("mtp."):
            assert torch.equal(before[name], after[name])
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_the_job_survives_pickling_and_its_config_a_round_trip(bandit_base, tmp_path):
    given = job(bandit_base, tmp_path)
    assert pickle.loads(pickle.dumps(given)) == given
    assert GrpoConfig.parse(json.loads(given.config.model_dump_json())) == given.config
