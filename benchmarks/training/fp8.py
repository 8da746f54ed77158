"""Training in fp8 against bf16: one recipe's pre-training, the same seed, data and schedule, and nothing else changed.

    fathom run corpus --recipe h100
    python benchmarks/training/fp8.py --tokens FOLDER_OF_THE_TOKENS_ARTIFACT --steps 600 --seeds 0

Runs the trainer itself, each precision in turn; a run that is kept in --runs already is not made again. The final
loss is the mean over the last tenth of the steps. `bf16_again` is bf16 in micro-batches half as large: its sums are
rounded otherwise and nothing else is, so what it differs by is chance. Writes results/fp8_loss.json and its plot beside
this file, or into --out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import record
from flows.recipes.h100 import CONFIGS
from infra import provenance
from stages.pretrain import PretrainConfig
from stages.tokens.bpe import load_tokenizer
from stages.training.data import TokenWindows
from stages.training.job import TrainJob
from stages.training.trainer import train
from stages.training.validation import Validation

PRECISIONS = ("bf16", "fp8", "bf16_again")


def run(precision: str, seed: int, tokens: str, steps: int) -> dict[str, Any]:
    """Every step's loss and gradient norm, and the last bits per byte."""
    chosen = {**CONFIGS["pretrain"], "steps": steps, "precision": precision.removesuffix("_again"), "seed": seed}
    if precision == "bf16_again":
        chosen["micro_batch_size"] //= 2
    config = PretrainConfig(**chosen)
    windows = tokens, config.sequence_length
    rows: list[dict[str, float]] = []
    began = said = time.monotonic()

    def report(done: int, total: int, unit: str, **metrics: float) -> None:
        nonlocal said
        rows.append({"step": done, **metrics})
        if "loss" in metrics and time.monotonic() - said > 10:
            said = time.monotonic()
            left = (said - began) / max(done, 1) * (total - done)
            print(
                f"{precision} seed {seed}: {done}/{total}, loss {metrics['loss']:.4f}, {left:.0f} s left",
                flush=True,
            )

    with tempfile.TemporaryDirectory() as folder:
        job = TrainJob(
            model=config.trained_model(load_tokenizer(tokens).vocab_size),
            optimization=config,
            data=TokenWindows(*windows, config.mask_documents),
            steps=steps,
            batch_size=config.batch_size,
            batch_ramp=config.batch_ramp,
            validation=Validation(*windows, config.validation_windows, steps),
            save_every=steps,
            out=str(Path(folder) / "out"),
            scratch=str(Path(folder) / "resume"),
            tokenizer=tokens,
        )
        result = train(job, report)
    trained = [row for row in rows if "loss" in row]
    last = trained[-max(1, len(trained) // 10) :]
    return {
        "precision": precision,
        "seed": seed,
        "device": provenance.device_name(),
        "versions": provenance.package_versions(),
        "parameters": job.model.n_parameters(),
        "tokens": result.progress.tokens,
        "tokens_per_second": result.progress.tokens / result.progress.seconds,
        "skipped": result.progress.skipped,
        "final_loss": mean(row["loss"] for row in last),
        "bits_per_byte": {k: v for k, v in rows[-1].items() if k.startswith("bits_per_byte")},
        "loss": [round(row["loss"], 4) for row in trained],
        "gradient_norm": [round(row["gradient_norm"], 3) for row in trained],
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """The losses, and how far the others' lie above bf16's, smoothed over 20 steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    losses, gap = figure.subplots(1, 2)
    by = {(found["precision"], found["seed"]): found for found in runs}
    for (precision, seed), found in by.items():
        losses.plot(found["loss"], label=f"{precision}, seed {seed}", linewidth=1)
        if precision != "bf16" and ("bf16", seed) in by:
            ratio = [100 * (a / b - 1) for a, b in zip(found["loss"], by["bf16", seed]["loss"], strict=True)]
            smooth = [mean(ratio[max(0, at - 19) : at + 1]) for at in range(len(ratio))]
            gap.plot(smooth, label=f"{precision}, seed {seed}", linewidth=1)
    losses.set(xlabel="step", ylabel="loss", yscale="log")
    losses.legend()
    gap.axhline(0.0, color="grey", linewidth=0.8)
    gap.set(xlabel="step", ylabel="loss above bf16's, %", ylim=(-2, 2))
    gap.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", required=True, help="folder of an artifact of the stage tokenize")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--runs", type=Path, help="folder that keeps the finished runs; none: --out")
    parser.add_argument("--commit", help="of the tree, where it is no checkout")
    arguments = parser.parse_args()
    folder = arguments.runs or arguments.out
    for made in (folder, arguments.out):
        made.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for precision in arguments.precisions:
            kept = folder / f"fp8_run_{precision}_{seed}.json"
            if not kept.is_file():
                made = {"commit": arguments.commit or provenance.git_state()[0]}
                made |= run(precision, seed, arguments.tokens, arguments.steps)
                kept.write_text(json.dumps(made))
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("fp8_run_*.json"))]
    by = {(found["precision"], found["seed"]): found for found in runs}
    rows = []
    for (precision, seed), found in by.items():
        if precision != "bf16" and (exact := by.get(("bf16", seed))):
            case = (
                f"loss {precision}, {found['parameters'] / 1e6:.0f}M, {found['tokens'] / 1e6:.0f}M tokens, seed {seed}"
            )
            ratio = exact["final_loss"] / found["final_loss"]
            rows.append({"case": case, "metric": "1 / final loss, of bf16's", "ours": ratio, "anchors": {"bf16": 1.0}})
            if precision == "fp8":
                speeds = found["tokens_per_second"], exact["tokens_per_second"]
                rows.append({"case": case, "metric": "tokens/s", "ours": speeds[0], "anchors": {"bf16": speeds[1]}})
    if rows:
        plot(runs, arguments.out / "fp8_loss.png")
        command = f"python benchmarks/training/fp8.py --tokens FOLDER --steps {arguments.steps}"
        command += " --seeds " + " ".join(map(str, arguments.seeds))
        about = {name: runs[-1][name] for name in ("device", "versions")}
        record.write(arguments.out / "fp8_loss.json", command, rows, arguments.commit, **about, runs=runs)
        for row in rows:
            print(row)


if __name__ == "__main__":
    main()
