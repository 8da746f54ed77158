"""What both sides of `step.py` do, and from what: a device's models, taught a little, and one step's questions."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from flows.recipes import h100, tiny
from model.config import ModelConfig
from model.exchange import export_hf
from model.transformer import Transformer
from stages.grpo import GrpoConfig
from stages.problems.problem import Problem
from stages.problems.registry import LANGUAGES, generate
from stages.tokens import bpe
from stages.training.checkpoint import load_model, save_model

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


def make_task(setting: Setting, ends: str, kl: float, taught: Path, folder: Path) -> Task:
    changes = {"rewards": REWARDS, "kl_coefficient": kl, "keep_rollouts_every": 0, "warmup_steps": 0}
    config = GrpoConfig(**{**setting.grpo, **changes, "template": "r1_zero", "steps": 10**6})
    problems = generate(setting.families, LANGUAGES, config.groups_per_step, 2, "train", setting.levels)
    return Task(config, tuple(problems), *end_replies_with(ENDS[ends], taught, folder))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
