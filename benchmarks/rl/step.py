"""Time of one GRPO step: ours against TRL's `GRPOTrainer` with its `transformers` generation, in turns in one process.

    .venv/bin/python benchmarks/rl/step.py --device cpu
    .venv/bin/python benchmarks/rl/step.py --device cuda

Both start from the same weights (ours, exported to the published format), ask the same questions by the same ids, as
many replies each, are paid by the same function and make one update with the same learning rate, clip and KL
coefficient. The model is the recipe's (`tiny` on a CPU, `h100` on a GPU) and has first read some worked problems: the
replies of random weights earn nothing and end anywhere. The reward counts repeats too, so that most groups have
contrast: those without have no gradient but the KL term's, and our learner passes over them where TRL's does not.

- `full`: a mark that the model has never seen ends a reply, so replies run to the limit, and hardly a group is flat;
- `ends`: replies end where the model ends them. What share of groups is flat is kept as `flat_groups`.

Ours is `Learner.step` itself, as the recipe sets it: questions, generation, rewards, advantages, update, metrics. TRL's
is what passes from the end of our turn to the end of its step; it does not log, save or checkpoint activations, attends
by SDPA, and its settings (size of a micro-batch, implementation of experts) are the fastest of several, tried before
the turns begin. On a GPU its weights are bf16. A figure is the median over the turns, after some that warm up; rewards
and lengths of the first turn, when the weights are still equal, must agree. Processor time is kept beside the clock's:
it says the same on a machine that others use.

Writes results/step_<device>.json beside this file, or into --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # read once, on import

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from benchmarks import record
from benchmarks.rl.peer import EXPERTS, Paid, Peer, trainer
from benchmarks.rl.task import ENDS, SETTINGS, Setting, Task, make_task, say, teach
from stages.rl.learner import GrpoJob, Learner
from stages.training.checkpoint import load_config
from stages.training.distributed import Ranks


class Ours:
    """Our learner, a step a call."""

    def __init__(self, task: Task, device: str) -> None:
        folder = task.ours.parent
        job = GrpoJob(task.config, str(task.ours), task.problems, str(folder / "out"), str(folder / "scratch"))
        self.learner = Learner(job, Ranks(0, 1, torch.device(device)))
        self.steps = 0

    def step(self) -> dict[str, float]:
        row = self.learner.step(self.steps)
        self.steps += 1
        return {name: row[name] for name in ("reward", "length", "reply_tokens", "flat_groups", "generation_share")}


class Turns(TrainerCallback):
    """Times TRL's steps, and after each lets the other side (if there is one) make one of its own."""

    def __init__(self, device: str, paid: Paid, other: Callable[[], dict[str, float]] | None) -> None:
        self.device, self.paid, self.other = device, paid, other
        self.theirs: list[dict[str, float]] = []
        self.ours: list[dict[str, float]] = []

    def now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def since(self, began: tuple[float, float]) -> dict[str, float]:
        wall, cpu = self.now()
        return {"seconds": wall - began[0], "cpu_seconds": cpu - began[1]}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = self.now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.theirs.append(self.since(self.began) | self.paid.row())
        if self.other:
            began = self.now()
            row = self.other()
            self.ours.append(self.since(began) | row)
            say(f"  turn {len(self.ours)}: ours {brief(self.ours[-1])}, TRL {brief(self.theirs[-1])}")
        self.began = self.now()


def run(
    task: Task,
    setting: Setting,
    device: str,
    steps: int,
    peer: Peer,
    other: Callable[[], dict[str, float]] | None = None,
) -> Turns:
    with tempfile.TemporaryDirectory() as folder:
        made, paid = trainer(task, setting, device, steps, peer, Path(folder))
        turns = Turns(device, paid, other)
        made.add_callback(turns)
        made.train()
    return turns


def fastest(task: Task, setting: Setting, device: str) -> Peer:
    """The setting of TRL whose second step takes least processor time (on a GPU: time): sizes first, then experts."""
    clock = "seconds" if device == "cuda" else "cpu_seconds"
    kinds = EXPERTS if load_config(task.ours).is_moe else (None,)
    replies = len(task.problems) * task.config.group_size
    taken: dict[Peer, float] = {}

    def attempt(peer: Peer) -> None:
        taken[peer] = run(task, setting, device, 2, peer).theirs[-1][clock]
        say(f"  {peer}: {taken[peer]:.2f} s")

    for size in setting.sizes:
        attempt(Peer(min(size, replies), kinds[0]))
    best = min(taken, key=taken.__getitem__).micro_batch
    for kind in kinds[1:]:
        attempt(Peer(best, kind))
    return min(taken, key=taken.__getitem__)


def check_same_work(ours: dict[str, float], theirs: dict[str, float], replies: int) -> None:
    """The first turn's mean reward and length agree within four standard errors."""
    for name in ("reward", "length"):
        bound = 4 * theirs[f"{name}_sd"] * (2 / replies) ** 0.5 + 1e-2 * abs(theirs[name])
        if abs(ours[name] - theirs[name]) > bound:
            sys.exit(f"the work differs: {name} is {ours[name]:.3f} here and {theirs[name]:.3f} in TRL (± {bound:.3f})")


def rows_of(case: str, ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Tokens a second of the whole step and steps a second: medians over turns, and the spread of the turns' ratios."""
    measures: dict[str, Callable[[dict[str, float]], float]] = {
        "reply tokens a second": lambda row: row["reply_tokens"] / row["seconds"],
        "steps a second": lambda row: 1 / row["seconds"],
        "reply tokens a second of the processor": lambda row: row["reply_tokens"] / row["cpu_seconds"],
    }
    rows = []
    for metric, value in measures.items():
        own, other = [value(row) for row in ours], [value(row) for row in theirs]
        ratios = [a / b for a, b in zip(own, other, strict=True)]
        row = {"case": case, "metric": metric, "ours": statistics.median(own)}
        row["anchors"] = {"trl": statistics.median(other)}
        row["ratio"] = row["ours"] / row["anchors"]["trl"]
        row["flat_groups"] = statistics.mean(turn["flat_groups"] for turn in ours)
        row["ratio_of_turns"] = [min(ratios), statistics.median(ratios), max(ratios)]
        rows.append(row)
    return rows


def brief(row: dict[str, float]) -> str:
    return f"{row['seconds']:.2f} s (reward {row['reward']:.3f}, length {row['length']:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=SETTINGS, default="cpu")
    parser.add_argument("--models", nargs="+", help="of the device's; none: all")
    parser.add_argument("--ends", nargs="+", choices=ENDS, default=["full", "ends"])
    parser.add_argument("--kl", nargs="+", type=float, default=[0.001])
    parser.add_argument("--micro-batches", nargs="+", type=int, help="of TRL, to choose from; none: the device's")
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="of a tree that is no checkout")
    arguments = parser.parse_args()
    asked = [f"--device {arguments.device} --turns {arguments.turns}"]
    for option in ("models", "ends", "kl", "micro_batches"):
        if (given := getattr(arguments, option)) != parser.get_default(option):
            asked.append(f"--{option.replace('_', '-')} {' '.join(map(str, given))}")
    logging.disable_progress_bar()
    setting, device = SETTINGS[arguments.device], arguments.device
    if arguments.micro_batches:
        setting = dataclasses.replace(setting, sizes=tuple(arguments.micro_batches))
    rows: list[dict[str, Any]] = []
    runs: dict[str, Any] = {}
    for name in arguments.models or setting.models:
        with tempfile.TemporaryDirectory() as folder:
            taught, peer = Path(folder) / "taught", None
            say(f"{name}: reading worked problems")
            teach(taught, setting.models[name], setting, device)
            for ends, kl in itertools.product(arguments.ends, arguments.kl):
                case = f"{'h100' if device == 'cuda' else 'cpu'} {name}, {ends} replies, KL {kl:g}"
                say(case)
                task = make_task(setting, ends, kl, taught, Path(folder) / f"{ends}-{kl}")
                peer = peer or fastest(task, setting, device)
                ours = Ours(task, device)
                turns = run(task, setting, device, arguments.warm_up + arguments.turns, peer, ours.step)
                check_same_work(turns.ours[0], turns.theirs[0], len(task.problems) * task.config.group_size)
                found = rows_of(case, turns.ours[arguments.warm_up :], turns.theirs[arguments.warm_up :])
                for row in found:
                    say(f"  {row['metric']}: {row['ours']:.3g} for {row['anchors']['trl']:.3g}, × {row['ratio']:.2f}")
                rows += found
                runs[case] = {"peer": dataclasses.asdict(peer), "ours": turns.ours, "trl": turns.theirs}
                record.write(  # after every case: a run that is cut short leaves those that it finished
                    arguments.out / f"step_{device}.json",
                    " ".join(["python benchmarks/rl/step.py", *asked]),
                    rows,
                    arguments.commit,
                    warm_up=arguments.warm_up,
                    load_average=os.getloadavg()[0],
                    runs=runs,
                )


if __name__ == "__main__":
    main()
