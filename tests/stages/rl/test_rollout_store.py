"""The store gives back what was written under the same key, whole, and nothing else."""

import pyarrow.parquet as pq
import pytest
import torch

from infra.errors import InputError
from stages.problems.problem import Problem
from stages.rl.engines.base import Reply, Sampling
from stages.rl.explore import Asking, Explorer
from stages.rl.rewards import RewardWeights
from stages.rl.rollout import Rollout, read_rollouts
from stages.rl.rollout_store import RolloutStore, weights_digest
from stages.tokens.bpe import load_tokenizer
from stages.training.checkpoint import load_model

SAMPLING = Sampling(max_new_tokens=9)


class Counting:
    """An engine whose replies name their seed, and that counts how often it is asked."""

    def __init__(self):
        self.asked = []

    def update_weights(self, named_tensors):
        pass

    def generate(self, prompts, sampling, seed):
        self.asked.append(seed)
        return [
            Reply([40 + place, 41], [-0.1 * (place + 1), -seed / 3], place % 2 == 0) for place in range(len(prompts))
        ]


@pytest.fixture
def explorer(bandit_base, tmp_path):
    def make(engine, weight=0.0, **changes):
        asking = Asking(
            **{"template": "chat", "sampling": SAMPLING, "group_size": 2, "rewards": RewardWeights(), **changes}
        )
        model = load_model(bandit_base)
        made = Explorer(engine, load_tokenizer(bandit_base), model.config, asking, RolloutStore(tmp_path))
        made.take([("weight", torch.tensor([weight, 1.0]))])
        return made

    return make


def test_a_chunk_is_asked_once_and_read_back_the_same_by_the_next_run(explorer, bandit_problems, tmp_path):
    engine = Counting()
    first = explorer(engine).chunk(4, 1, 6, bandit_problems[:3], seed=7)
    again = explorer(engine).chunk(4, 1, 6, bandit_problems[:3], seed=7)
    assert engine.asked == [7]
    assert [vars(rollout) | {"score": None} for rollout in again] == [
        vars(rollout) | {"score": None, "logprobs": torch.tensor(rollout.logprobs).tolist()} for rollout in first
    ]
    assert [(a.score.reward, dict(a.score.rules), a.score.reason) for a in again] == [
        (f.score.reward, dict(f.score.rules), f.score.reason) for f in first
    ]
    rows = list(read_rollouts(tmp_path))
    assert [(row["step"], row["group"], row["sample"]) for row in rows] == [
        (4, g, s) for g in (6, 7, 8) for s in (0, 1)
    ]
    assert [Rollout.from_row(row).problem for row in rows[::2]] == list(bandit_problems[:3])


def test_rollouts_of_before_some_columns_are_read_and_taken_up(explorer, bandit_problems, tmp_path):
    engine = Counting()
    explorer(engine).chunk(1, 0, 0, bandit_problems[:2], seed=7)
    assert [row["reason"] for row in read_rollouts(tmp_path)] == ["no single answer"] * 4
    (path,) = tmp_path.glob("rollouts-*")
    pq.write_table(pq.read_table(path).drop_columns(["reason", "harmlessness"]), path)
    assert [(row["reason"], row["harmlessness"]) for row in read_rollouts(tmp_path)] == [(None, None)] * 4
    assert [row["reason"] for row in read_rollouts(tmp_path, ("step", "reason"))] == [None] * 4
    assert set(next(read_rollouts(tmp_path, ("step",)))) == {"step"}
    again = explorer(engine).chunk(1, 0, 0, bandit_problems[:2], seed=7)
    assert [rollout.score.reason for rollout in again] == [""] * 4
    assert engine.asked == [7]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"weight": 1e-7},
        {"problems": slice(1, 4)},
        {"group_size": 3},
        {"sampling": Sampling(max_new_tokens=9, top_p=0.9)},
        {"template": "r1_zero"},
        {"rewards": RewardWeights(format=0.3)},
        {"target_language": "zh"},
    ],
)
def test_a_chunk_of_anything_else_is_asked_again_and_takes_the_stale_ones_place(
    explorer, bandit_problems, tmp_path, change
):
    engine = Counting()
    explorer(engine).chunk(4, 1, 0, bandit_problems[:3], seed=7)
    problems, seed = bandit_problems[change.pop("problems", slice(0, 3))], change.pop("seed", 7)
    rollouts = explorer(engine, **change).chunk(4, 1, 0, problems, seed=seed)
    assert engine.asked == [7, seed]
    assert [row["prompt_ids"] for row in read_rollouts(tmp_path)] == [rollout.prompt for rollout in rollouts]


@pytest.mark.parametrize("harm", ["cut", "flip", "empty"])
def test_a_damaged_chunk_is_asked_again_and_an_artifacts_is_refused(explorer, bandit_problems, tmp_path, harm):
    engine = Counting()
    explorer(engine).chunk(1, 0, 0, bandit_problems[:3], seed=7)
    (path,) = tmp_path.glob("*.parquet")
    good = path.read_bytes()
    place = good.index(b"arm-0") if harm == "flip" else 0
    bad = {"cut": good[:-40], "empty": b"", "flip": good[:place] + b"X" + good[place + 1 :]}[harm]
    path.write_bytes(bad)
    with pytest.raises(InputError, match="damaged"):
        list(read_rollouts(tmp_path))
    explorer(engine).chunk(1, 0, 0, bandit_problems[:3], seed=7)
    assert engine.asked == [7, 7]
    assert path.read_bytes() == good


def test_steps_and_chunks_that_are_not_wanted_are_forgotten(explorer, bandit_problems, tmp_path):
    asked, store = explorer(Counting()), RolloutStore(tmp_path)
    for step in (1, 2, 10):
        for chunk in range(3):
            asked.chunk(step, chunk, chunk, bandit_problems[:1], seed=step)
    store.cut(2, 1)
    store.keep(lambda step: step > 1)
    assert sorted({(row["step"], row["group"]) for row in read_rollouts(tmp_path)}) == [
        (2, 0),
        (10, 0),
        (10, 1),
        (10, 2),
    ]


def test_a_digest_of_weights_tells_a_single_bit():
    weights = {"a": torch.randn(3, 5), "b": torch.zeros(2, dtype=torch.bfloat16)}
    before = weights_digest(weights.items())
    assert weights_digest((name, tensor.clone()) for name, tensor in weights.items()) == before
    weights["a"].view(torch.int32)[1, 2] ^= 1
    assert weights_digest(weights.items()) != before


def test_a_problem_survives_the_way_to_disk(bandit_problems):
    assert Problem.from_json(bandit_problems[3].to_json()) == bandit_problems[3]
