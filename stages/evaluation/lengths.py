"""Loss by length: nats per token and bits per byte by position in the window, and by the length of the document.

Windows hold whole documents of the validation split, long ones first (stages.tokens.packing), so a late position lies
deep inside a document where there are long ones. By position a model shows whether it can be run that far at all; by
document length, whether a long text gains from what stands in it. Both measures come from one pass.

Legend: T positions of a window, V vocabulary, I bins.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from infra.metrics import Report
from model.transformer import Transformer
from stages.evaluation.intervals import bootstrap_ratio
from stages.tokens.loader import PackedLoader
from stages.training.distributed import Ranks

MEASURES = ("position", "document")


@dataclasses.dataclass(frozen=True)
class WindowLoss:
    """One window's [nats, tokens, bytes] by bin, float64 [I, 3], for each of MEASURES."""

    window: int
    position: np.ndarray
    document: np.ndarray


def spread(loader: PackedLoader, n: int) -> list[int]:
    """n windows: half of them long where there are as many, each half evenly spaced over its kind."""
    n_others = loader.n_windows - loader.n_long
    n_long = min(loader.n_long, max(n // 2, n - n_others))
    chosen = [np.linspace(0, loader.n_long - 1, n_long), np.linspace(loader.n_long, loader.n_windows - 1, n - n_long)]
    return sorted({int(window) for window in np.concatenate(chosen)})


@torch.no_grad()
def window_losses(
    model: Transformer,
    loader: PackedLoader,
    windows: Sequence[int],
    edges: Sequence[int],
    bytes_V: np.ndarray,
    ranks: Ranks,
    report: Report,
    done_before: int,
) -> list[WindowLoss]:
    """This rank's share of the windows. Bin i holds positions, or lengths of documents, from edges[i] to edges[i + 1];
    the last one whatever is longer. `bytes_V` is the UTF-8 length of each token."""
    mine = windows[ranks.rank :: ranks.world]
    starts = np.asarray(edges[:-1])
    losses = []
    for number, window in enumerate(mine, start=1):
        batch = loader.read(np.array([window]))
        tokens_BT = batch["tokens_BT"].to(ranks.device)
        nats_T = -model(tokens_BT[:, :-1]).log_probs(tokens_BT[:, 1:])[0].double().cpu().numpy()
        targets_T = batch["tokens_BT"][0, 1:].numpy()
        counted = np.stack([nats_T, np.ones_like(nats_T), bytes_V[targets_T]])
        lengths_T = loader.document_lengths(window)[1:]
        bins = {"position": np.arange(len(nats_T)), "document": lengths_T - 1}
        sums = {
            name: np.stack(
                [np.bincount(np.searchsorted(starts, values, "right") - 1, row, len(starts)) for row in counted], 1
            )
            for name, values in bins.items()
        }
        losses.append(WindowLoss(window, **sums))
        report(done_before + min(len(windows), number * ranks.world), done_before + len(windows), "windows")
    return losses


def length_table(
    measure: str, edges: Sequence[int], before: Sequence[WindowLoss], after: Sequence[WindowLoss]
) -> list[dict[str, Any]]:
    """One row a bin that has any token: both checkpoints on the same windows, 95 % intervals over windows."""
    sums = [np.stack([getattr(loss, measure) for loss in losses]) for losses in (before, after)]
    rows = []
    for number, (start, end) in enumerate(pairwise(edges)):
        has = sums[0][:, number, 1] > 0
        if not has.any():
            continue
        (old, new) = (each[has, number] for each in sums)
        last = number == len(edges) - 2 and measure == "document"
        row: dict[str, Any] = {
            "bin": f"{start}+" if last else f"{start}-{end}",
            "windows": int(has.sum()),
            "tokens": int(old[:, 1].sum()),
            "bytes": int(old[:, 2].sum()),
        }
        for name, values in (("before", old), ("after", new)):
            nats, tokens, size = values.sum(0)
            row[name] = {
                "nats_per_token": dataclasses.asdict(bootstrap_ratio(values[:, 0], values[:, 1])),
                "perplexity": math.exp(nats / tokens),
                "bits_per_byte": nats / math.log(2) / size if size else None,
            }
        row["change"] = dataclasses.asdict(bootstrap_ratio(new[:, 0] - old[:, 0], old[:, 1]))
        rows.append(row)
    return rows
