"""SIGKILL at 25 points drawn by seed, five in a row for each of five jobs, and not one bit of difference.

A point is a step (of training, or of training some way into the next steps) or a call inside the background save that
follows it. Every run but the first begins with what the one before it left.
"""

import pickle
import signal
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from stages.training.resume import ResumeStore
from stages.training.schedules import BatchRamp
from stages.training.trainer import train
from stages.training.validation import Validation

STEPS, SAVE_EVERY, KILLS = 30, 2, 5

# Functions of resume.py, and how many of their calls to draw from; none: in training, whatever is saved meanwhile.
PLACES = [
    ("", 0),
    ("", 0),
    ("_Hashing.write", 300),
    ("_Hashing.write", 300),
    ("_Writer.finish", 1),
    ("_sync", 6),
    ("ResumeStore._publish", 1),
    ("_remove", 1),
]

VICTIM = """
import pickle, signal, threading, time
from stages.training import resume
from stages.training.trainer import train

armed = threading.Event()
calls = 0
since = time.monotonic()

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def deadly(function):
    def call(*args, **names):
        global calls
        calls += armed.is_set()
        if calls == point.call:
            die()
        return function(*args, **names)
    return call

def report(done, total, unit, **metrics):
    global since
    duration, since = time.monotonic() - since, time.monotonic()
    if point and done == point.step:
        armed.set()
        if not point.function:
            threading.Timer(point.later * duration, die).start()

if point and point.function:
    owner, _, name = point.function.rpartition(".")
    place = getattr(resume, owner) if owner else resume
    setattr(place, name, deadly(getattr(place, name)))
result = train(job, report)
(folder / "result.pickle").write_bytes(pickle.dumps(result))
"""


@dataclass(frozen=True)
class Point:
    """Die `later` × a step after `step`, or at the `call`-th call of one of resume.py's functions after it."""

    step: int
    later: float = 0.0
    function: str = ""
    call: int = 0


def points(seed: str) -> list[Point]:
    """Where a job dies, in order. Each lies beyond the last state that the one before it can have published."""
    draw, found = Random(seed), []
    for kill in range(KILLS):
        step = 5 * kill + draw.randint(2, 5)
        function, calls = draw.choice(PLACES)
        found.append(Point(step, draw.uniform(0, 2), function, draw.randint(1, max(calls, 1))))
    return found


@pytest.fixture
def jobs(make_job, micro_v3, micro_llama, tokens_dir):
    """jobs(name, folder): five jobs with all that a step's result can depend on."""
    common = {"steps": STEPS, "save_every": SAVE_EVERY, "validation": Validation(str(tokens_dir), 32, 2, every=7)}
    kinds = {
        # V3's experts, MTP and biases, and everything else at once
        "whole": (
            micro_v3,
            {"ema_decay": 0.9, "micro_batch_size": 2, "recompute": ("rms_norm", "mla_up", "swiglu")},
            {"batch_ramp": BatchRamp(start=2, until=0.7)},
        ),
        "v3": (micro_v3, {"bias_update_speed": 0.01, "ema_decay": 0.9}, {}),
        "llama": (micro_llama, {}, {}),
        "accumulation": (micro_v3.replace(score_function="softmax"), {"micro_batch_size": 1}, {}),
        "average": (micro_llama, {"ema_decay": 0.99, "checkpoint_weights": "ema"}, {}),
    }

    def make(name: str, folder: str):
        model, options, changes = kinds[name]
        return make_job(model, folder, {"seed": 3, **options}, **common, **changes)

    return make


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["v3", *(pytest.param(name, marks=SLOW) for name in ("whole", "llama", "accumulation", "average"))]
)
def test_five_kills_in_a_row_change_no_bit_of_losses_states_or_weights(name, jobs, start, tmp_path):
    torch.set_num_threads(1)
    whole, killed = jobs(name, "uninterrupted"), jobs(name, "killed")
    expected = train(whole, lambda *args, **metrics: None)
    for point in points(name):
        victim = start(VICTIM, job=killed, folder=tmp_path, point=point)
        victim.join(timeout=120)
        assert victim.exitcode == -signal.SIGKILL, point
        drafts = list(Path(killed.scratch).glob("*.draft"))
        assert bool(drafts) or point.function not in ("_Hashing.write", "_Writer.finish"), point
        assert not Path(killed.out).exists()
    last = start(VICTIM, job=killed, folder=tmp_path, point=None)
    last.join(timeout=120)
    assert last.exitcode == 0
    resumed = pickle.loads((tmp_path / "result.pickle").read_bytes())
    assert without_timing(resumed.progress.rows) == without_timing(expected.progress.rows)
    weights, reference = (load_file(Path(job.out) / "model.safetensors") for job in (killed, whole))
    assert weights.keys() == reference.keys()
    assert [name for name in weights if not torch.equal(weights[name], reference[name])] == []
    ours, theirs = (ResumeStore(job.scratch).load() for job in (killed, whole))
    for state in (ours, theirs):
        state["progress"]["rows"] = without_timing(state["progress"]["rows"])
        del state["progress"]["seconds"]
    assert ours["progress"]["step"] == STEPS
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def without_timing(rows):
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def test_the_points_are_spread_over_steps_and_over_the_parts_of_a_save():
    drawn = [point for name in ("whole", "v3", "llama", "accumulation", "average") for point in points(name)]
    assert len(drawn) == 25
    assert len({point.step for point in drawn}) > 10
    assert {point.function for point in drawn} >= {"", "_Hashing.write", "_Writer.finish", "ResumeStore._publish"}


INTERRUPTED = """
from stages.training.trainer import train

def report(done, total, unit, **metrics):
    if done == 13:
        raise KeyboardInterrupt

try:
    train(job, report)
except KeyboardInterrupt:
    pass
"""


@pytest.mark.slow
def test_a_job_that_ran_on_two_ranks_goes_on_alone(jobs, run_ranks, start, tmp_path):
    """World size changes float rounding alone."""
    expected = train(jobs("v3", "uninterrupted"), lambda *args, **metrics: None)
    job = jobs("v3", "moved")
    run_ranks(INTERRUPTED, job=job)
    assert len(list(Path(job.scratch, "step-00000012").glob("*.distcp"))) == 2
    resumed = train(job, lambda *args, **metrics: None)
    losses = [[loss for _, loss in result.values("loss")] for result in (resumed, expected)]
    assert len(losses[0]) == STEPS
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
