"""A job of reinforcement learning on the bandit, small enough for a test."""

import pytest

from stages.grpo import GrpoConfig
from stages.rl.learner import GrpoJob


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
