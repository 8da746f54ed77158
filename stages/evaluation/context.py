"""How far a model's context reaches: loss by length and needles in a haystack, of two checkpoints on the same texts.

`measure_context` is what one rank does for one checkpoint; `compare` puts before and after side by side. A model that
was never extended is run past its context as it is, without YaRN: what it does there is what an extension has to mend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infra.metrics import Report
from model.transformer import Transformer
from stages.evaluation.lengths import MEASURES, WindowLoss, length_table, spread, window_losses
from stages.evaluation.needle import CHANCE, Haystacks, NeedleGrid, find_needles, needle_table
from stages.evaluation.text import token_bytes
from stages.tokens.bpe import load_tokenizer
from stages.tokens.loader import PackedLoader
from stages.tokens.packing import LongDocuments
from stages.training.checkpoint import load_config, load_weights
from stages.training.distributed import process_group


@dataclass(frozen=True)
class ContextJob:
    """A checkpoint, the texts to measure it on, and how much of them."""

    checkpoint: str
    tokens: str
    edges: tuple[int, ...]  # of the bins: 0, the contexts, the last of them the longest
    windows: int
    needle: NeedleGrid | None
    needle_lengths: tuple[int, ...]
    tokens_at_once: int
    precision: Literal["fp32", "bf16"]
    seed: int
    done_before: int = 0  # units that the stage has reported already


@dataclass(frozen=True)
class ContextMeasure:
    """What the ranks measured of one checkpoint, in the order of windows and of cases."""

    losses: list[WindowLoss]
    needles: list[dict[str, Any]]


def measure_context(job: ContextJob, report: Report) -> ContextMeasure:
    """This rank's share of the windows and cases."""
    longest = job.edges[-1]
    with process_group() as ranks:
        # A copy without checks: the length may be beyond what the checkpoint was made for.
        config = load_config(job.checkpoint).model_copy(update={"max_position": longest})
        model = load_weights(Transformer(config).to(ranks.device), job.checkpoint).eval()
        if job.precision == "bf16":
            model.round_weights()
        loader = PackedLoader(job.tokens, "validation", longest, 1, job.seed, documents=LongDocuments())
        bytes_V = np.array([len(spelled) for spelled in token_bytes(Path(job.tokens))])
        windows = spread(loader, min(job.windows, loader.n_windows))
        losses = window_losses(model, loader, windows, job.edges, bytes_V, ranks, report, job.done_before)
        needles: list[dict[str, Any]] = []
        if job.needle is not None:
            tokenizer = load_tokenizer(job.tokens)
            haystacks = Haystacks(job.tokens, job.needle, job.needle_lengths, tokenizer, job.seed)
            done_before = job.done_before + len(windows)
            needles = find_needles(model, haystacks, job.tokens_at_once, ranks, report, done_before)
        return ContextMeasure(losses, needles)


def gather(parts: Sequence[ContextMeasure]) -> ContextMeasure:
    """The ranks' shares, dealt out in turn, as one."""
    return ContextMeasure(
        sorted((loss for part in parts for loss in part.losses), key=lambda loss: loss.window),
        [record for turn in zip_longest(*(part.needles for part in parts)) for record in turn if record is not None],
    )


def compare(job: ContextJob, before: ContextMeasure, after: ContextMeasure) -> dict[str, Any]:
    """report.json: the tables of both measures of loss, and of the needles if there were any."""
    report: dict[str, Any] = {
        f"loss_by_{measure}": length_table(measure, job.edges, before.losses, after.losses) for measure in MEASURES
    }
    if before.needles:
        report["needle"] = {"ranked_chance": CHANCE, "table": needle_table(before.needles, after.needles)}
    return report


def headline(report: dict[str, Any]) -> dict[str, float]:
    """The summary's figures, most important first: needles at the greatest length and in all, the last bin's loss."""
    figures: dict[str, float] = {}
    if "needle" in report:
        by_length = [row for row in report["needle"]["table"] if row["language"] == row["depth"] == "all"]
        longest = max((row for row in by_length if row["length"] != "all"), key=lambda row: row["length"])
        everything = next(row for row in by_length if row["length"] == "all")
        for name, row in ((f"_{longest['length']}", longest), ("", everything)):
            for measure in ("retrieved", "ranked"):
                for when in ("after", "before"):
                    figures[f"needle_{measure}{name}_{when}"] = round(row[when][measure]["mean"], 4)
        figures["needle_ranked_chance"] = CHANCE
        figures["needle_cases"] = everything["cases"]
    for row in reversed(report["loss_by_position"]):
        for when in ("after", "before"):
            figures[f"loss_{when}_{row['bin']}"] = row[when]["nats_per_token"]["mean"]
            figures[f"bits_per_byte_{when}_{row['bin']}"] = row[when]["bits_per_byte"]
    return figures
