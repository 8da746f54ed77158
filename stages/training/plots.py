"""Pictures of a training run: losses and bits per byte, the load of the experts, loss by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from stages.training.job import TrainResult


def plot_losses(path: Path, result: TrainResult) -> None:
    """Training loss (and MTP's) on the left axis's panel; validation bits per byte by language on the right one."""
    panels = 2 if result.languages else 1
    figure = Figure(figsize=(5.5 * panels, 3.6), layout="constrained")
    left, *right = figure.subplots(1, panels, squeeze=False)[0]
    for name in ("loss", "mtp_loss"):
        if values := result.values(name):
            left.plot(*zip(*values, strict=True), label=name.replace("_", " "), linewidth=1)
    left.set(xlabel="step", ylabel="nats per token", title="training loss")
    left.legend()
    for axes in right:
        for language in result.languages:
            axes.plot(*zip(*result.values(f"bits_per_byte_{language}"), strict=True), marker=".", label=language)
        axes.set(xlabel="step", ylabel="bits per byte", title="validation", yscale="log")
        axes.legend()
    figure.savefig(path, dpi=110)


def plot_expert_load(path: Path, result: TrainResult) -> bool:
    """Heat map of each expert's load over the mean, first and last validation interval; False for a dense model."""
    loads = result.values("load")
    if not loads:
        return False
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (step, load) in zip(figure.subplots(1, 2), (loads[0], loads[-1]), strict=True):
        load_LE = np.asarray(load, float)
        relative_LE = load_LE / load_LE.mean(-1, keepdims=True)
        image = axes.imshow(relative_LE, vmin=0, vmax=2, cmap="coolwarm", aspect="auto")
        axes.set(xlabel="expert", ylabel="mixture layer", title=f"load / mean load, up to step {step}")
        axes.set_yticks(range(len(relative_LE)))
    figure.colorbar(image, ax=figure.axes)
    figure.savefig(path, dpi=110)
    return True


def plot_bins(path: Path, bins: Sequence[str], losses: Mapping[str, Sequence[float]]) -> None:
    """Mean loss by position bin, one group of bars a bin, one colour a model."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(losses)
    for number, (name, values) in enumerate(losses.items()):
        axes.bar(np.arange(len(bins)) + number * width, values, width, label=name)
    axes.set_xticks(np.arange(len(bins)) + 0.4 - width / 2, bins)
    axes.set(xlabel="position", ylabel="nats per token", title="validation loss by position")
    axes.legend()
    figure.savefig(path, dpi=110)
