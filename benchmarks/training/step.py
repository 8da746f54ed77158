"""Tokens a second of one training step on one GPU, 4 × 4096 tokens, in bf16 and in fp8, at the layer shapes of

- DeepSeek-V2-Lite: one dense layer and four with 64 + 2 experts, against torchtitan and transformers in the same run;
- DeepSeek-V3: one dense layer and one with experts, 32 of its 256, an eighth as a rank of eight holds, with as many
  rows each. A vocabulary of 4096 has the share in these two layers that V3's has in all of its 61.

    python benchmarks/training/step.py --titan DIR_OF_THE_UNPACKED_WHEEL [--profile]

Ours is `Trainer.step` itself: loss, gradients, norm and clipping, AdamW with fp32 masters and bf16 moments, metrics.
The peers do less: forward, backward, torch's fused AdamW on bf16 weights and bf16 moments, no clipping. Every case runs
in a process of its own, ours first and last. Writes results/train_step.json beside this file, or into --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from model.config import ModelConfig
from model.presets import preset

BATCH, LENGTH = 4, 4096
WARM_UP, STEPS = 5, 12
MEASURED_BF16 = 785e12  # FLOP/s of an 8192³ product on one H100, random data
SHORT = {"max_position": LENGTH, "rope_factor": 1.0, "original_max_position": None}
SHAPES = {
    "v2_lite": preset("v2_lite").replace(n_layers=5, **SHORT),
    "v3": preset("v3").replace(n_layers=2, n_dense_layers=1, n_routed_experts=32, n_mtp=0, vocab_size=4096, **SHORT),
}
LAYERS = {"v2_lite": "1+4 layers", "v3": "1+1 layers"}
CASES = {
    "v2_lite": ("ours", "ours_fp8", "torchtitan", "transformers_compiled", "transformers", "ours_again"),
    "v3": ("ours", "ours_fp8", "ours_again"),
}


@dataclass(frozen=True)
class RandomTokens:
    """Uniform tokens, new ones every step: a batch seen twice is learnt, and zero gradients multiply faster."""

    sequence_length: int
    vocab_size: int

    def open(self, micro_batch: int, seed: int, rank: int, world: int) -> RandomTokens:
        assert (micro_batch, world) == (BATCH, 1)
        return self

    def batch(self, index: int) -> Any:
        from stages.training.data import Batch

        generator = torch.Generator().manual_seed(index)
        return Batch(torch.randint(self.vocab_size, (BATCH, self.sequence_length + 1), generator=generator))


def our_step(shapes: ModelConfig, folder: str, precision: str) -> Any:
    from stages.training.distributed import Ranks
    from stages.training.job import Optimization, TrainJob
    from stages.training.trainer import Trainer

    options = Optimization(
        learning_rate={"schedule": "constant", "peak": 1e-4},
        precision=precision,
        moments="bf16",
        micro_batch_size=BATCH,
        bias_update_speed=0.0,
    )
    data = RandomTokens(LENGTH, shapes.vocab_size)
    job = TrainJob(shapes, options, data, steps=10**6, batch_size=BATCH, out=folder, scratch=folder)
    trainer = Trainer(job, Ranks(0, 1, torch.device("cuda")))
    return lambda: trainer.step()["loss"]


def peer_step(shapes: ModelConfig, name: str, titan: str) -> Any:
    import peers

    torch.manual_seed(0)
    build = {
        "torchtitan": lambda: peers.torchtitan(shapes, titan),
        "transformers": lambda: peers.transformers(shapes, compiled=False),
        "transformers_compiled": lambda: peers.transformers(shapes, compiled=True),
    }
    parameters, loss_of = build[name]()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    batches, number = RandomTokens(LENGTH, shapes.vocab_size), itertools.count()

    def step() -> float:
        loss = loss_of(batches.batch(next(number)).tokens_BT.to("cuda", non_blocking=True))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(shapes: ModelConfig, case: str, titan: str, profile: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        precision = "fp8" if case == "ours_fp8" else "bf16"
        ours = case.startswith("ours")
        step = our_step(shapes, folder, precision) if ours else peer_step(shapes, case, titan)
        seconds = []
        for _ in range(WARM_UP + STEPS):
            torch.cuda.synchronize()
            started = time.perf_counter()
            loss = step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        # Of the whole run: what a CUDA graph uses is seen when it is recorded, not when it is replayed.
        timed, peak = seconds[WARM_UP:], torch.cuda.max_memory_allocated()
        if profile:
            write_profile(step, 1e3 * statistics.median(timed), shapes, profile)
    return {
        "case": case,
        "tokens_per_second": BATCH * LENGTH / statistics.median(timed),
        "step_ms": 1e3 * statistics.median(timed),
        "slowest_ms": 1e3 * max(timed),
        "fastest_ms": 1e3 * min(timed),
        "tflops": causal_flops_per_token(shapes) * BATCH * LENGTH / statistics.median(timed) / 1e12,
        "peak_gib": peak / 2**30,
        "loss": loss,
    }


# What a kernel's name says it is for; the first match counts.
PARTS = {
    "attention": r"sdpa|flash|compute_dot_do_o|convert_dq",
    "float8 products": r"^gemm$|^wgrad$",
    "quantisation": r"quantize",
    "grouped products (experts)": r"GemmUniversal|grouped_gemm",
    "dense products": r"nvjet|gemm|cutlass",
    "optimizer": r"_adamw",
    "gradient norm": r"multi_tensor_apply",
    "cross-entropy": r"_cross_entropy",
    "norms": r"_rms_norm",
    "SwiGLU": r"_swiglu",
    "rotation and keys": r"_rotate|_assemble|_take_apart",
    "permutation": r"gather|_gather_sum|RadixSort|index",
    "copies, sums and the rest": r"",
}


def write_profile(step: Any, step_ms: float, shapes: ModelConfig, path: Path, steps: int = 4) -> None:
    """GPU time of a step by part, and of every kernel, longest first; what is left of the step the GPU was idle."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels = [
        {"kernel": event.key[:160], "ms": event.self_device_time_total / 1e3 / steps, "calls": event.count / steps}
        for event in profiler.key_averages()
    ]
    parts = dict.fromkeys(PARTS, 0.0)
    for row in kernels:
        parts[next(part for part, pattern in PARTS.items() if re.search(pattern, row["kernel"]))] += row["ms"]
    parts["idle"] = max(0.0, step_ms - sum(parts.values()))
    kernels.sort(key=lambda row: -row["ms"])
    path.write_text(json.dumps({"step_ms": step_ms, "parts_ms": parts, "kernels": kernels}, indent=1) + "\n")
    plot_parts(parts, step_ms, shapes, path.with_suffix(".png"))


def plot_parts(parts: dict[str, float], step_ms: float, shapes: ModelConfig, path: Path) -> None:
    """Where a step's time goes, beside the time its products would take at the chip's measured bf16 rate."""
    from matplotlib.figure import Figure

    ideal = 1e3 * BATCH * LENGTH * causal_flops_per_token(shapes) / MEASURED_BF16
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(parts), list(parts.values()))
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set(xlabel="ms a step", title=f"{step_ms:.0f} ms a step; all products at 785 TFLOP/s: {ideal:.0f} ms")
    figure.savefig(path, dpi=110)


def causal_flops_per_token(config: ModelConfig) -> float:
    """Training FLOPs with attention counted below the diagonal alone."""
    attention = 6 * config.n_layers * config.n_heads * (config.head_dim + config.value_dim) * LENGTH
    return config.flops_per_token(LENGTH) - attention / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--titan", default="titan", help="folder of the unpacked torchtitan 0.2.2 wheel")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--cases", nargs="+", default=list(CASES["v2_lite"]), choices=CASES["v2_lite"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--profile", action="store_true", help="also write train_profile*.json, of ours")
    parser.add_argument("--commit", help="of the tree, where it is no checkout")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        (name,), (case,) = arguments.shapes, arguments.cases
        profile = None
        if arguments.profile and case in ("ours", "ours_fp8"):
            profile = arguments.out / f"train_profile_{name}{case.removeprefix('ours')}.json"
        print(json.dumps(measure(SHAPES[name], case, arguments.titan, profile)))
        return
    found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in arguments.shapes}
    for name in found:
        for case in (case for case in CASES[name] if case in arguments.cases):
            command = [sys.executable, __file__, "--one", "--shapes", name, "--cases", case]
            command += ["--titan", arguments.titan, "--out", str(arguments.out)]
            command += ["--profile"] if arguments.profile else []
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{name} {case} failed", file=sys.stderr)
                continue
            row = found[name][case] = {"shapes": name, **json.loads(done.stdout.splitlines()[-1])}
            print({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()}, file=sys.stderr)
    rows = [row for name, cases in found.items() for row in rows_of(name, cases)]
    runs = [row for cases in found.values() for row in cases.values()]
    command = "python benchmarks/training/step.py --titan DIR --profile"
    record.write(arguments.out / "train_step.json", command, rows, arguments.commit, runs=runs)


def rows_of(name: str, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed and memory of ours in bf16 (the slower of its two runs) against the peers, and of ours in fp8 against these
    and our bf16."""
    peers_found = {case: row for case, row in found.items() if not case.startswith("ours")}
    runs = [found[case] for case in ("ours", "ours_again") if case in found]
    compared = []
    if runs:
        bf16 = min(runs, key=lambda row: row["tokens_per_second"])
        compared.append(("", bf16, peers_found))
        if "ours_fp8" in found:
            compared.append((" fp8", found["ours_fp8"], {"bf16": bf16, **peers_found}))
    return [
        {
            "case": f"train_step{label} {name} {LAYERS[name]}, {BATCH}x{LENGTH} tokens",
            "metric": metric,
            "ours": value(ours),
            "anchors": {case: value(row) for case, row in anchors.items()},
        }
        for label, ours, anchors in compared
        for metric, value in (
            ("tokens_per_second", lambda row: row["tokens_per_second"]),
            ("1 / peak GiB", lambda row: 1 / row["peak_gib"]),
        )
    ]


if __name__ == "__main__":
    main()
