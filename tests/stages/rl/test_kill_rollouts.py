"""SIGKILL at 20 points drawn by seed, five in a row for each of four jobs: not one bit of difference, and no reply is
asked for twice but those of the chunk that the kill cut short.

A point is a step, and a call that comes after it (of exploring, of writing a chunk, of learning, of the background
save) or a moment. Every run but the first begins with what the one before it left. Of two ranks one is killed, and the
other ended as Ray ends it.
"""

import pickle
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psutil
import pytest
import torch

from infra.artifact import Artifact
from infra.errors import StageFailed
from infra.stage import Context
from stages.grpo import GrpoConfig, grpo
from stages.problems.problem import write_problems
from stages.rl.rollout import read_rollouts
from stages.training.checkpoint import load_model
from stages.training.resume import ResumeStore

SAVE_EVERY, KILLS = 2, 5
TIMING = ("tokens_per_second", "generation_share")

# Functions, and how many of their calls to draw from; none: a moment within the next step.
PLACES = [
    ("", "", 0),
    ("stages.rl.explore", "Explorer._ask", 4),
    ("stages.rl.explore", "RolloutStore.put", 4),
    ("stages.rl.rollout_store", "write_rollouts", 4),
    ("stages.rl.rollout", "os.fsync", 8),
    ("stages.rl.update", "Trained.step", 2),
    ("stages.rl.learner", "Learner.forget", 1),
    ("stages.training.resume", "ResumeStore._publish", 1),
    ("stages.training.resume", "_sync", 6),
]

VICTIM = """
import importlib, itertools, pickle, signal, threading, time
from stages.rl import explore
from stages.rl.learner import learn

armed = threading.Event()
calls = itertools.count(1)
since = None
mine = point is not None and int(os.environ.get("RANK", 0)) == point.rank

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def deadly(function):
    def call(*args, **names):
        fatal = armed.is_set() and next(calls) == point.call  # the save calls from a thread of its own
        if fatal and not point.after:
            die()
        result = function(*args, **names)
        if fatal:
            die()
        return result
    return call

def counted(put):
    def call(self, step, chunk, key, rows):
        with open(folder / "asked.log", "a") as log:
            log.write(f"{step} {chunk}\\n")
        put(self, step, chunk, key, rows)
    return call

def report(done, total, unit, **metrics):
    global since
    before, since = since, time.monotonic()
    if mine and (before or point.function) and done >= point.step and not armed.is_set():
        armed.set()
        if not point.function:
            threading.Timer(point.later * (since - before), die).start()

explore.RolloutStore.put = counted(explore.RolloutStore.put)
if mine and point.function:
    owner, _, name = point.function.rpartition(".")
    place = importlib.import_module(point.module)
    place = getattr(place, owner) if owner else place
    setattr(place, name, deadly(getattr(place, name)))
rows = learn(job, report)
if int(os.environ.get("RANK", 0)) == 0:
    (folder / "rows.pickle").write_bytes(pickle.dumps(rows))
"""


@dataclass(frozen=True)
class Point:
    """Die `later` × a step after `step`, or before or `after` the `call`-th call of a function from there on."""

    step: int
    rank: int
    module: str
    function: str
    call: int
    after: bool
    later: float


def points(name: str, kills: int) -> list[Point]:
    """Where a job dies, in order."""
    draw, found = Random(name), []
    for kill in range(kills):
        module, function, calls = draw.choice(PLACES)
        rank = 0 if function.endswith("_publish") else draw.randrange(JOBS[name][0])  # which rank 0 alone calls
        call, after, later = draw.randint(1, max(calls, 1)), draw.random() < 0.5, draw.uniform(0, 1)
        found.append(Point(kill + draw.randint(0, 2), rank, module, function, call, after, later))
    return found


# Ranks, and options with all that a step's result can depend on.
JOBS = {
    "grpo": (1, {"reference_renew_every": 3, "updates_per_exploration": 2}),
    "ppo": (1, {"loss": "ppo", "critic": {"learning_rate": 1e-2}}),
    "stale": (
        1,
        {"staleness": 1, "importance_cap": 2.0, "max_mismatch_kl": None, "dynamic_sampling": 1, "group_size": 3},
    ),
    "ranks": (2, {"reference_renew_every": 3, "dynamic_sampling": 1, "group_size": 3}),
}


@pytest.fixture
def run(start, tmp_path):
    """run(job, world, point): the job in processes of its own, to its end or to its death; the exit codes."""

    def go(job, world, folder, point=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0"}
        ranks = [
            start(VICTIM, shared | {"RANK": str(rank)}, job=job, folder=folder, point=point) for rank in range(world)
        ]
        if point:
            ranks[point.rank].join(timeout=600)
            for process in ranks:
                if process is not ranks[point.rank]:
                    process.kill()
            return ranks[point.rank].exitcode
        for process in ranks:
            process.join(timeout=600)
        return max(abs(process.exitcode) for process in ranks)

    return go


SLOW = pytest.mark.slow
CASES = [("stale", 2), *(pytest.param(name, KILLS, marks=SLOW) for name in JOBS)]


@pytest.mark.parametrize(("name", "kills"), CASES)
def test_kills_in_a_row_change_no_bit_and_ask_for_no_reply_twice(name, kills, job, run, tmp_path):
    torch.set_num_threads(1)
    world, options = JOBS[name]
    common = {
        "steps": 4 * kills + 2,
        "save_every": SAVE_EVERY,
        "keep_rollouts_every": 1,
        "rollout_groups": 1,
        **options,
    }
    whole, killed = job(tmp_path / "whole", **common), job(tmp_path / "killed", **common)
    assert run(whole, world, tmp_path / "whole") == 0
    for point in points(name, kills):
        assert run(killed, world, tmp_path / "killed", point) == -signal.SIGKILL, point
    assert run(killed, world, tmp_path / "killed") == 0

    ours, theirs = (pickle.loads((tmp_path / name / "rows.pickle").read_bytes()) for name in ("killed", "whole"))
    assert without_timing(ours) == without_timing(theirs)
    ours, theirs = (load_model(given.out).state_dict() for given in (killed, whole))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    ours, theirs = (ResumeStore(Path(given.scratch) / "resume").load() for given in (killed, whole))
    for state in (ours, theirs):
        state["rows"] = without_timing(state["rows"])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    ours, theirs = (list(read_rollouts(Path(given.scratch) / "rollouts")) for given in (killed, whole))
    assert ours == theirs
    assert len({(row["step"], row["group"], row["sample"]) for row in ours}) == len(ours)
    asked, once = ((tmp_path / name / "asked.log").read_text().splitlines() for name in ("killed", "whole"))
    assert len(once) == len(set(once))
    assert set(asked) == set(once)
    assert len(asked) <= len(once) + kills * world


def without_timing(rows):
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def test_the_points_are_spread_over_steps_and_over_the_parts_of_a_step():
    drawn = [point for name in JOBS for point in points(name, KILLS)]
    assert len(drawn) == 20
    assert len({point.step for point in drawn}) > 4
    assert len({point.function for point in drawn}) > 5


@SLOW
def test_a_rank_that_ray_loses_ends_the_stage_and_the_next_run_goes_on(bandit_base, bandit_problems, tmp_path):
    write_problems(tmp_path / "train.jsonl", bandit_problems)
    inputs = {
        "checkpoint": Artifact.local(bandit_base, "checkpoint"),
        "problems": Artifact.local(tmp_path, "problems"),
    }
    options = {"steps": 6, "groups_per_step": 4, "rollout_groups": 2, "max_new_tokens": 14, "save_every": 2}
    config = GrpoConfig(**options, learning_rate=3e-3)
    whole, killed = (Context.local(tmp_path / name, workers=2) for name in ("whole", "killed"))
    expected = grpo(config, inputs, whole)

    def kill(progress):
        if progress.done == 3:
            ours = psutil.Process().children(recursive=True)
            ranks = [process for process in ours if "ray::_run_rank" in " ".join(process.cmdline())]
            ranks[-1].kill()

    with pytest.raises(StageFailed, match="run again to resume"):
        grpo(config, inputs, Context(killed.out, killed.scratch, 2, kill))
    assert ResumeStore(killed.scratch / "resume").steps() == [2]
    assert grpo(config, inputs, killed) == expected
    ours, theirs = (load_model(ctx.out).state_dict() for ctx in (killed, whole))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
