"""Decoding: our batched generator against `transformers.generate`, and our own options against the plain generator.

    .venv/bin/python benchmarks/training/decode.py --checkpoint base@latest --problems generate_problems@latest

Both sides generate greedily from the same exported weights in fp32: the same ragged prompts (8 to 32 tokens, padded on
the left for transformers), the same number of tokens, one thread, in turns; a figure is the median over the rounds. The
last case of a model has stop tokens: transformers runs a batch until its longest reply ends, ours takes in the next
prompt, and the tokens up to each stop count. transformers gets the fastest of its implementations of experts, found at
batch 16. A drafting module must have learnt something, so speculation and the float8 cache are measured on a checkpoint
of the store, on its line's held-out questions. Writes results/decode_<device>.json beside this file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is imported

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks import record
from flows.recipes.tiny import MODEL, STUDENT
from infra.settings import Settings
from infra.store import ArtifactStore
from model.config import ModelConfig
from model.exchange import export_hf
from model.generate import Completion, Generator, acceptance_rate
from model.presets import preset
from model.transformer import Transformer
from stages.problems.problem import read_problems
from stages.rl.prompts import prompt_ids
from stages.tokens.bpe import load_tokenizer
from stages.training.checkpoint import load_model

NEW, BATCHES = 64, (1, 16, 64)
EXPERTS = ("eager", "grouped_mm", "batched_mm")
MODELS = {
    "deepseek_v3 of the tiny recipe": ModelConfig(**{**MODEL, "vocab_size": 2048, "n_mtp": 0}),
    "deepseek_v3 of 5.4M": ModelConfig(
        **{"vocab_size": 4096, "d_model": 192, "n_layers": 4, "n_heads": 4, "d_ff": 768, "init_std": 0.05},
        **{"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_dense_layers": 1},
        **{"n_routed_experts": 8, "n_activated_experts": 2, "n_shared_experts": 1, "moe_d_ff": 192},
        **{"n_groups": 4, "n_limited_groups": 2},
    ),
    "llama of the tiny recipe": ModelConfig(**{"family": "llama", **STUDENT, "vocab_size": 2048}),
    "llama of 6.5M": ModelConfig(
        **{"family": "llama", "vocab_size": 4096, "d_model": 256, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4},
        **{"d_ff": 704, "init_std": 0.05},
    ),
}


def rates(sides: dict[str, Callable[[], object]], tokens: int, rounds: int) -> dict[str, float]:
    """Tokens/s of each side: the median over rounds in which they take turns, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, generate in sides.items():
            began = time.perf_counter()
            generate()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: tokens / statistics.median(taken) for name, taken in seconds.items()}


def published(model: Transformer, device: str, **options: str) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        export_hf(model, folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).to(device).eval()


def peer(
    oracle: torch.nn.Module, prompts: list[list[int]], device: str, stop: list[int] | None = None
) -> list[list[int]]:
    """What `transformers.generate` adds to each prompt; behind a stop token, padding."""
    width = max(map(len, prompts))
    padded_BT = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    real_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": stop, "pad_token_id": 0}
    return oracle.generate(padded_BT, attention_mask=real_BT, **settings)[:, width:].tolist()


def in_batches(oracle: torch.nn.Module, prompts: list[list[int]], device: str, stop: list[int]) -> list[list[int]]:
    """All prompts, 16 at a time."""
    batches = (prompts[start : start + 16] for start in range(0, len(prompts), 16))
    return [reply for batch in batches for reply in peer(oracle, batch, device, stop)]


def against_transformers(device: str, rounds: int) -> list[dict]:
    rows = []
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = Transformer(config).to(device).eval()
        lengths = torch.randint(8, 33, (max(BATCHES),)).tolist()
        prompts = [torch.randint(config.vocab_size, (length,)).tolist() for length in lengths]
        kinds = EXPERTS if config.is_moe else (None,)
        peers = {kind: published(model, device, **({"experts_implementation": kind} if kind else {})) for kind in kinds}
        trial = rates({kind: partial(peer, peers[kind], prompts[:16], device) for kind in kinds}, 16 * NEW, 3)
        kind = max(trial, key=trial.__getitem__)

        def record(
            case: str, tokens: int, same: bool, sides: dict[str, Callable[[], object]], name=name, kind=kind
        ) -> None:
            found = rates(sides, tokens, rounds)
            row = {"case": f"decode {name}, {case}", "metric": "tokens/s", "ours": found["ours"]}
            row["anchors"] = {"transformers.generate": found["theirs"]}
            rows.append(row | {"ratio": found["ours"] / found["theirs"], "same_tokens": same, "experts": kind})
            print(rows[-1], flush=True)

        for batch in BATCHES:
            ours = partial(Generator(model).generate, prompts[:batch], NEW, temperature=0)
            theirs = partial(peer, peers[kind], prompts[:batch], device)
            same = [c.tokens for c in ours()] == theirs()
            record(f"batch {batch}", batch * NEW, same, {"ours": ours, "theirs": theirs})

        stop = list(range(0, config.vocab_size, 32))
        ours = partial(Generator(model, max_batch=16).generate, prompts, NEW, temperature=0, stop_ids=stop)
        theirs = partial(in_batches, peers[kind], prompts, device, stop)
        replies = [completion.tokens for completion in ours()]
        same = replies == [tokens[: len(reply)] for tokens, reply in zip(theirs(), replies, strict=True)]
        tokens = sum(map(len, replies))
        record(f"{len(prompts)} prompts with stops, batch 16", tokens, same, {"ours": ours, "theirs": theirs})
    return rows


def options(store: ArtifactStore, checkpoint: str, problems: str, device: str, rounds: int) -> list[dict]:
    artifact, rows = store.check(checkpoint), []
    model, tokenizer = load_model(artifact.path, device), load_tokenizer(artifact.path)
    asked = list(read_problems(store.check(problems).path / "heldout.jsonl"))
    for batch in BATCHES:
        prompts = [prompt_ids(problem.question, "r1_zero", tokenizer) for problem in asked[:batch]]
        for temperature in (0.0, 1.0):
            replies: dict[str, list[Completion]] = {}

            def generate(name: str, prompts=prompts, temperature=temperature, replies=replies, **extra) -> None:
                seeded = torch.Generator(device).manual_seed(0)
                replies[name] = Generator(model, **extra).generate(prompts, NEW, temperature, generator=seeded)

            sides = {
                "plain": partial(generate, "plain"),
                "speculation": partial(generate, "speculation", speculate=True),
                "float8 cache": partial(generate, "float8 cache", cache_dtype="float8"),
            }
            found = rates(sides, batch * NEW, rounds)
            case = f"decode {artifact.id}, batch {batch}, temperature {temperature:g}"
            anchors = {"plain": found["plain"]}
            for name in ("speculation", "float8 cache"):
                row = {"case": f"{case}, {name}", "metric": "tokens/s", "ours": found[name], "anchors": anchors}
                rows.append(row | {"ratio": found[name] / found["plain"]})
            row = {"case": f"{case}, speculation", "metric": "acceptance of the second token"}
            row["ours"] = acceptance_rate(replies["speculation"])
            rows.append(row | {"anchors": {"DeepSeek-V3 at 671B, lowest": 0.85, "highest": 0.90}})
            print(*rows[-3:], sep="\n", flush=True)
    for name, config, width in ((artifact.id, model.config, 4), ("v3", preset("v3"), 2)):
        sizes = [config.cache_bytes_per_token(width, float8=float8) for float8 in (False, True)]
        row = {"case": f"decode {name}, float8 cache", "metric": "tokens per byte of the cache", "ours": 1 / sizes[1]}
        rows.append(row | {"anchors": {f"{8 * width}-bit cache": 1 / sizes[0]}, "bytes_per_token": sizes})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", help="id or tag of a checkpoint with an MTP module; none: without its cases")
    parser.add_argument("--problems", default="generate_problems@latest")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    rows = against_transformers(arguments.device, arguments.rounds)
    if arguments.checkpoint:
        settings = Settings.load()
        store = ArtifactStore(settings.store, settings.workspace)
        rows += options(store, arguments.checkpoint, arguments.problems, arguments.device, arguments.rounds)
    record.write(
        Path(__file__).parent / "results" / f"decode_{arguments.device}.json",
        record.command("benchmarks/training/decode.py"),
        rows,
        threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0],  # others on the machine: ratios within a round hold, rates do not
    )


if __name__ == "__main__":
    main()
