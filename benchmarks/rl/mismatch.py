"""How far what explores lies from what learns, weights unmoved: our engine's replies and vLLM's, read by the learner.

    .venv/bin/python benchmarks/rl/mismatch.py --checkpoint final_rl@latest --problems generate_problems@latest

Each case is one step of `grpo`, as far as the learner's first look at what was explored: engine and learner have the
same weights (vLLM is sent them as in any step), so what is measured is arithmetic alone. Of every reply token the
learner's log-probability is compared with the engine's, as for a run's metrics `mismatch_kl` and `mismatch_max_ratio`;
but over all replies, where a step leaves out groups without contrast.

Writes results/mismatch_<device>.json beside this file, or into --out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # read once, on import

import torch

from benchmarks import record
from infra.artifact import Artifact
from infra.settings import Settings
from infra.store import ArtifactStore
from model.transformer import Transformer
from stages.grpo import GrpoConfig
from stages.problems.problem import Problem, read_problems
from stages.rl.engines.vllm import VllmEngine
from stages.rl.learner import GrpoJob, Learner
from stages.rl.micro_batch import micro_batches, token_logprobs
from stages.rl.mismatch import Mismatch, mismatch
from stages.rl.rollout import Rollout
from stages.training.distributed import Ranks

# What explores: our engine, which computes with the learner's own weights, or vLLM in a precision of its own.
ENGINES = {"native": None, "vllm float32": "float32", "vllm bfloat16": "bfloat16"}
PRECISIONS = ("fp32", "bf16")  # of the learner


def measure(config: GrpoConfig, engine: str, checkpoint: Path, problems: tuple[Problem, ...], ranks: Ranks) -> Mismatch:
    """Of all replies of a first step, whose weights are the checkpoint's."""
    with tempfile.TemporaryDirectory() as folder:
        learner = Learner(GrpoJob(config, str(checkpoint), problems, folder, folder), ranks)
        if dtype := ENGINES[engine]:
            learner.explorer.engine = VllmEngine(learner.model, str(checkpoint), dtype)
        return compare(learner.model, learner.explore(0), learner.tokenizer.pad, config)


@torch.no_grad()
def compare(model: Transformer, rollouts: Sequence[Rollout], pad: int, config: GrpoConfig) -> Mismatch:
    """Read the replies as the learner does."""
    batch = [(rollout, [0.0] * len(rollout.tokens)) for rollout in rollouts]
    learned, sampled = [], []
    for micro in micro_batches(batch, pad, config.micro_batch_tokens, model.embedding.weight.device):
        learned.append(token_logprobs(model, micro, config.temperature)[micro.mask_BR])
        sampled.append(micro.engine_logprobs_BR[micro.mask_BR])
    return mismatch(torch.cat(learned), torch.cat(sampled))


def rows_of(case: str, seen: Mismatch) -> list[dict[str, Any]]:
    case = f"{case}, {seen.tokens:,} tokens"
    figures = {
        "KL(engine ‖ learner), nats a token": seen.kl_sum / seen.tokens,
        "largest ratio, less 1": seen.max_ratio - 1,
    }
    return [{"case": case, "metric": metric, "ours": value, "anchors": {}} for metric, value in figures.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", default="final_rl@latest", help="a reference, or a folder")
    parser.add_argument("--problems", default="generate_problems@latest", help="a reference, or a folder")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of the learner")
    parser.add_argument("--template", default="chat")
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="of a tree that is no checkout")
    arguments = parser.parse_args()
    settings = Settings.load()
    store = ArtifactStore(settings.store, settings.workspace)
    checkpoint, problems = (
        Artifact.local(Path(given), kind) if Path(given).is_dir() else store.check(given)
        for given, kind in ((arguments.checkpoint, "checkpoint"), (arguments.problems, "problems"))
    )
    ranks = Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    asked = tuple(read_problems(problems.path / "train.jsonl"))
    rows = []
    for precision in arguments.precisions:
        for engine in arguments.engines:
            config = GrpoConfig(
                **{"steps": 1, "learning_rate": 0.0, "kl_coefficient": 0.0, "keep_rollouts_every": 0},
                **{"precision": precision, "template": arguments.template},
                **{"groups_per_step": arguments.groups, "rollout_groups": arguments.groups},
                **{"group_size": arguments.group_size, "max_new_tokens": arguments.max_new_tokens},
            )
            with ProcessPoolExecutor(1, get_context("spawn")) as process:  # vLLM keeps its memory till its process ends
                seen = process.submit(measure, config, engine, checkpoint.path, asked, ranks).result()
            rows += rows_of(f"{precision} learner, {engine}", seen)
            for row in rows[-2:]:
                print(f"{row['case']}: {row['metric']} {row['ours']:.3g}", file=sys.stderr)
    path = arguments.out / f"mismatch_{ranks.device.type}.json"
    record.write(path, record.command("benchmarks/rl/mismatch.py"), rows, arguments.commit, checkpoint=checkpoint.id)


if __name__ == "__main__":
    main()
