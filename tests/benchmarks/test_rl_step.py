"""The benchmark of a GRPO step, at micro size: both sides have the same policy and are paid alike. Needs TRL."""

import pytest
import torch

pytest.importorskip("trl")
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.rl import peer, step, task
from model.config import ModelConfig
from stages.rl.prompts import prompt_ids
from stages.tokens import bpe
from stages.training.checkpoint import load_model

MICRO = ModelConfig(
    **{"vocab_size": 320, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64, "init_std": 0.05},
    **{"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_dense_layers": 1},
    **{"n_routed_experts": 4, "n_activated_experts": 2, "n_shared_experts": 1, "moe_d_ff": 16},
)
SETTING = task.Setting(
    {"micro": MICRO},
    ("compare", "reverse"),
    (1,),
    {"groups_per_step": 4, "rollout_groups": 2, "group_size": 4, "max_new_tokens": 8, "learning_rate": 1e-3},
    {"n": 64, "vocab_size": 320, "steps": 8, "batch": 8, "learning_rate": 1e-2},
    (8,),
    torch.float32,
)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught") / "checkpoint"
    task.teach(folder, MICRO, SETTING, "cpu")
    return folder


def test_both_sides_take_turns_from_the_same_policy(taught, tmp_path):
    asked = task.make_task(SETTING, "ends", 0.001, taught, tmp_path)
    prompt_T = torch.tensor([prompt_ids(asked.problems[0].question, "r1_zero", bpe.load_tokenizer(asked.ours))])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(asked.published)(prompt_T).logits
        ours = load_model(asked.ours)
        torch.testing.assert_close(ours.logits(ours(prompt_T).hidden_BTD), theirs, rtol=1e-4, atol=1e-4)

    turns = step.run(asked, SETTING, "cpu", 2, peer.Peer(8, "eager"), step.Ours(asked, "cpu").step)

    assert len(turns.ours) == len(turns.theirs) == 2
    step.check_same_work(turns.ours[0], turns.theirs[0], replies=16)
    rows = step.rows_of("cpu micro", turns.ours, turns.theirs)
    assert all(row["ours"] > 0 and row["anchors"]["trl"] > 0 for row in rows)


def test_in_the_full_case_a_mark_that_nobody_writes_ends_a_reply_on_both_sides(taught, tmp_path):
    asked = task.make_task(SETTING, "full", 0.0, taught, tmp_path)
    tokenizer = bpe.load_tokenizer(asked.ours)
    assert tokenizer.eos == tokenizer.user
    assert AutoTokenizer.from_pretrained(asked.published).eos_token_id == tokenizer.user


def test_work_that_differs_is_refused():
    row = {"reward": 0.5, "length": 20.0, "reward_sd": 0.4, "length_sd": 5.0}
    step.check_same_work(row, row, replies=256)
    with pytest.raises(SystemExit, match="length is 25"):
        step.check_same_work(row | {"length": 25.0}, row, replies=256)
