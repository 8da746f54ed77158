"""The benchmark of mismatch, at micro size: our engine computes what the learner does, and bf16 is seen."""

import pytest
import torch

from benchmarks.rl.mismatch import measure, rows_of
from stages.grpo import GrpoConfig
from stages.problems.registry import generate
from stages.training.distributed import Ranks


def test_our_engine_in_fp32_is_the_learners_own_policy_and_in_bf16_nearly(taught, tmp_path):
    problems = tuple(generate(("compare",), ("en",), 4, 0, "train", (1,)))
    base = taught(tmp_path, [(f"Pull {arm}.", str(arm)) for arm in range(10)], steps=20, max_position=256)
    seen = {}
    for precision in ("fp32", "bf16"):
        options = {"steps": 1, "groups_per_step": 4, "rollout_groups": 4, "group_size": 4, "max_new_tokens": 14}
        config = GrpoConfig(precision=precision, **options)
        seen[precision] = measure(config, "native", base, problems, Ranks(0, 1, torch.device("cpu")))
        assert 16 < seen[precision].tokens <= 16 * 14
    assert seen["fp32"].max_ratio == pytest.approx(1, abs=1e-5)
    assert seen["fp32"].kl_sum < 1e-9 < seen["bf16"].kl_sum
    assert [row["ours"] > 0 for row in rows_of("bf16", seen["bf16"])] == [True, True]
