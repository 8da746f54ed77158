"""Time of one GRPO step: ours against TRL's `GRPOTrainer` with its `transformers` generation, in turns in one process.

    .venv/bin/python benchmarks/rl/step.py --device cpu
    .venv/bin/python benchmarks/rl/step.py --device cuda

Both start from the same weights (ours, exported to the published format), ask the same questions by the same ids, as
many replies each, are paid by the same function and make one update with the same learning rate, clip and KL
coefficient. The model is the recipe's (`tiny` on a CPU, `h100` on a GPU) and has first read some worked problems: the
replies of random weights earn nothing and end anywhere. The reward counts repeats too, so that groups have contrast: a
group without it is one that our learner passes over and TRL's does not. There should be none, and its share is kept.

- `full`: a mark that the model has never seen ends a reply, so replies run to the limit;
- `ends`: replies end where the model ends them.

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
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # read once, on import

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks import record
from flows.recipes import h100, tiny
from model.config import ModelConfig
from model.exchange import export_hf
from model.transformer import Transformer
from stages.grpo import GrpoConfig
from stages.problems.problem import Problem
from stages.problems.registry import LANGUAGES, generate
from stages.rl.learner import GrpoJob, Learner
from stages.rl.prompts import prompt_ids, reply_text
from stages.rl.rewards import score
from stages.tokens import bpe
from stages.training.checkpoint import load_config, load_model, save_model
from stages.training.distributed import Ranks

# transformers' implementations, to choose from. The third, batched_mm, copies an expert's weights for every token: more
# memory than there is, in training.
EXPERTS = ("grouped_mm", "eager")
ENDS = {"ends": bpe.EOS, "full": bpe.USER}  # the mark that ends a reply: the one taught, and one that nobody writes
REWARDS = {"accuracy": 1.0, "format": 0.1, "language": 0.1, "repetition": 1.0}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A device's models, what they read, and the GRPO settings of its recipe."""

    models: dict[str, ModelConfig]
    families: tuple[str, ...]
    levels: tuple[int, ...] | None
    grpo: dict[str, Any]
    taught: dict[str, Any]
    sizes: tuple[int, ...]  # of TRL's micro-batches, to choose from
    dtype: torch.dtype  # of TRL's weights


SETTINGS = {
    "cpu": Setting(
        {
            "deepseek_v3": ModelConfig(**{**tiny.MODEL, "vocab_size": 2048, "n_mtp": 0}),
            "llama": ModelConfig(family="llama", **tiny.STUDENT, vocab_size=2048),
        },
        tiny.FAMILIES,
        tiny.LEVELS,
        {**tiny.GRPO, "groups_per_step": 32},
        {"n": 4000, "vocab_size": 2048, "steps": 160, "batch": 16, "learning_rate": 2e-3},
        (32, 128),
        torch.float32,
    ),
    "cuda": Setting(
        {"deepseek_v3": ModelConfig(**{**h100.MODEL, "vocab_size": 16384, "n_mtp": 0})},
        h100.FAMILIES,
        None,
        h100.RL,
        {"n": 20_000, "vocab_size": 16384, "steps": 200, "batch": 64, "learning_rate": 8e-4},
        (64, 256),
        torch.bfloat16,
    ),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What both sides do: one question each of `problems`, `config.group_size` replies, from the weights in `ours`."""

    config: GrpoConfig
    problems: tuple[Problem, ...]
    ours: Path
    published: Path


def teach(folder: Path, config: ModelConfig, setting: Setting, device: str) -> None:
    """Leave a checkpoint in `folder`, with its tokenizer, that has read worked problems, one a row."""
    how = setting.taught
    read = [p.worked for p in generate(setting.families, LANGUAGES, how["n"], 1, "train", setting.levels)]
    tokenizer = bpe.train(read, how["vocab_size"], digits="single")
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    rows = [[tokenizer.bos, *ids, tokenizer.eos] for ids in tokenizer.encode_batch(read)]
    torch.manual_seed(0)
    model = Transformer(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=how["learning_rate"], betas=(0.9, 0.95))
    for step in range(how["steps"]):
        optimizer.param_groups[0]["lr"] = how["learning_rate"] * min(1, (step + 1) / 20, 2 - 2 * step / how["steps"])
        batch = [rows[(step * how["batch"] + place) % len(rows)] for place in range(how["batch"])]
        longest = max(map(len, batch))
        tokens_BT = torch.tensor([row + [tokenizer.pad] * (longest - len(row)) for row in batch], device=device)
        targets_BT = tokens_BT[:, 1:]
        loss = -model(tokens_BT[:, :-1]).log_probs(targets_BT)[targets_BT != tokenizer.pad].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 40 == 0:
            say(f"  read {step + 1} of {how['steps']} batches, loss {loss.item():.3f}")
    save_model(folder, model, None)


def end_replies_with(mark: str, taught: Path, folder: Path) -> tuple[Path, Path]:
    """The taught checkpoint as ours and as published, with `mark` for its EOS."""
    ours, published = folder / "ours", folder / "published"
    model = load_model(taught)
    save_model(ours, model, taught)
    settings = ours / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": mark}, ensure_ascii=False))
    export_hf(model, published, ours)
    return ours, published


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


class Paid:
    """The reward function that TRL calls: our rules on its token ids. Remembers what it saw of each step."""

    __name__ = "paid"

    def __init__(self, task: Task) -> None:
        self.task, self.tokenizer = task, bpe.load_tokenizer(task.ours)
        self.rewards: list[float] = []
        self.lengths: list[int] = []

    def __call__(self, completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
        config = self.task.config
        self.lengths = [len(ids) for ids in completion_ids]
        self.rewards = [
            score(
                self.task.problems[which],
                reply_text(ids, self.tokenizer),
                ids[-1] == self.tokenizer.eos,
                config.rewards,
                config.target_language,
                len(ids),
                config.max_new_tokens,
            ).reward
            for ids, which in zip(completion_ids, number, strict=True)
        ]
        return self.rewards

    def row(self) -> dict[str, float]:
        return {
            "reward": statistics.mean(self.rewards),
            "length": statistics.mean(self.lengths),
            "reply_tokens": float(sum(self.lengths)),
            "reward_sd": statistics.stdev(self.rewards),
            "length_sd": statistics.stdev(self.lengths),
        }


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


@dataclasses.dataclass(frozen=True)
class Peer:
    """What is left to choose for TRL."""

    micro_batch: int
    experts: str | None  # None: the model has none


def trainer(
    task: Task, setting: Setting, device: str, steps: int, peer: Peer, folder: Path
) -> tuple[GRPOTrainer, Paid]:
    """TRL's trainer for `steps` steps of the task, and its reward function."""
    config = task.config
    options = {"experts_implementation": peer.experts} if peer.experts else {}
    model = AutoModelForCausalLM.from_pretrained(
        task.published, dtype=setting.dtype, attn_implementation="sdpa", **options
    )
    tokenizer = AutoTokenizer.from_pretrained(task.published)
    ours = bpe.load_tokenizer(task.ours)
    rows = []
    for number, problem in enumerate(task.problems):
        row = {"prompt": f"{bpe.BOS}{problem.question}\n", "number": number}
        assert tokenizer(row["prompt"])["input_ids"] == prompt_ids(problem.question, config.template, ours), row
        rows.append(row)
    replies = len(rows) * config.group_size
    arguments = GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=peer.micro_batch,
        gradient_accumulation_steps=replies // peer.micro_batch,
        num_generations=config.group_size,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        beta=config.kl_coefficient,
        loss_type="grpo",
        use_bias_correction_kl=False,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=config.max_gradient_norm,
        adam_beta2=0.95,
        optim="adamw_torch_fused",
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    paid = Paid(task)
    made = GRPOTrainer(model, paid, arguments, Dataset.from_list(rows), processing_class=tokenizer)
    made.remove_callback(PrinterCallback)
    return made, paid


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


def make_task(setting: Setting, ends: str, kl: float, taught: Path, folder: Path) -> Task:
    changes = {"rewards": REWARDS, "kl_coefficient": kl, "keep_rollouts_every": 0, "warmup_steps": 0}
    config = GrpoConfig(**{**setting.grpo, **changes, "template": "r1_zero", "steps": 10**6})
    problems = generate(setting.families, LANGUAGES, config.groups_per_step, 2, "train", setting.levels)
    return Task(config, tuple(problems), *end_replies_with(ENDS[ends], taught, folder))


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
        row["ratio_of_turns"] = [min(ratios), statistics.median(ratios), max(ratios)]
        rows.append(row)
    return rows


def brief(row: dict[str, float]) -> str:
    return f"{row['seconds']:.2f} s (reward {row['reward']:.3f}, length {row['length']:.1f})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
                    " ".join(["python", "benchmarks/rl/step.py", *sys.argv[1:]]),
                    rows,
                    arguments.commit,
                    warm_up=arguments.warm_up,
                    load_average=os.getloadavg()[0],
                    runs=runs,
                )


if __name__ == "__main__":
    main()
