"""Pictures of a training run: losses and bits per byte, routing health, loss by length, the needle map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from stages.training.job import TrainResult

MAPS = 12  # layers whose load is shown, spread over the depth


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


def plot_routing_health(path: Path, health: Mapping[str, Any]) -> None:
    """Each layer's load over the run, an expert a line; under them MaxVio and bias drift, a layer a curve."""
    rows, names = health["rows"], health["layers"]
    shown = sorted({round(layer) for layer in np.linspace(0, len(names) - 1, min(len(names), MAPS))})
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(12, 2.4 * lines + 3.2), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[2.4 * lines, 3.2])
    steps, load_SLE = [row["step"] for row in rows], np.asarray([row["load"] for row in rows], float)
    relative_SLE = load_SLE / load_SLE.mean(-1, keepdims=True).clip(1)
    maps = upper.subplots(lines, columns, squeeze=False).ravel()
    for axes, layer in zip(maps, shown, strict=False):
        extent = (0, steps[-1], health["experts"] - 0.5, -0.5)
        image = axes.imshow(relative_SLE[:, layer].T, vmin=0, vmax=2, cmap="coolwarm", aspect="auto", extent=extent)
        axes.set(title=names[layer], ylabel="expert")
    for axes in maps[len(shown) :]:
        axes.set_axis_off()
    upper.colorbar(image, ax=maps.tolist(), label="load / mean load")
    curves = {
        "batch_violation": "MaxVio of a step",
        "global_violation": "MaxVio of a row's steps together",
        "bias_drift": "bias drift",
    }
    for axes, (measure, title) in zip(lower.subplots(1, len(curves)), curves.items(), strict=True):
        for layer, name in enumerate(names):
            axes.plot(steps, [row[measure][layer] for row in rows], label=name, linewidth=1)
        axes.set(title=title, xlabel="step")
    if len(names) <= MAPS:
        lower.legend(*axes.get_legend_handles_labels(), fontsize=7, loc="outside right center")
    figure.savefig(path, dpi=110)


def plot_loss_by_length(path: Path, report: Mapping[str, Any]) -> None:
    """Nats per token by position and by length of the document, before and after, with their intervals."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = (("position", "position in the window"), ("document", "tokens of the document"))
    for axes, (measure, label) in zip(figure.subplots(1, 2), panels, strict=True):
        rows = report[f"loss_by_{measure}"]
        for when in ("before", "after"):
            figures = [row[when]["nats_per_token"] for row in rows]
            middle = np.array([each["mean"] for each in figures])
            ends = np.array([[each["low"] for each in figures], [each["high"] for each in figures]])
            axes.errorbar([row["bin"] for row in rows], middle, abs(ends - middle), marker="o", capsize=3, label=when)
        axes.set(xlabel=label, ylabel="nats per token", title="validation loss, 95 % intervals")
        axes.legend()
    figure.savefig(path, dpi=110)


def plot_needles(path: Path, report: Mapping[str, Any]) -> bool:
    """Length × depth, before and after, a language each: numbers retrieved whole, and digits ranked first."""
    if "needle" not in report:
        return False
    cells = [row for row in report["needle"]["table"] if row["depth"] != "all"]
    lengths, depths, languages = (sorted({row[name] for row in cells}) for name in ("length", "depth", "language"))
    figure = Figure(figsize=(3.4 * 2 * len(languages), 6), layout="constrained")
    panels = figure.subplots(2, 2 * len(languages), squeeze=False)
    titles = {"retrieved": "retrieved", "ranked": f"digits ranked first (chance {report['needle']['ranked_chance']:g})"}
    for line, (measure, title) in zip(panels, titles.items(), strict=True):
        for place, axes in enumerate(line):
            language, when = languages[place // 2], ("before", "after")[place % 2]
            share_DL = np.full((len(depths), len(lengths)), np.nan)
            for row in cells:
                if row["language"] == language:
                    share_DL[depths.index(row["depth"]), lengths.index(row["length"])] = row[when][measure]["mean"]
            image = axes.imshow(share_DL, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for (depth, length), share in np.ndenumerate(share_DL):
                axes.text(length, depth, f"{share:.2f}", ha="center", va="center", fontsize=8)
            axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            axes.set_title(f"{title}\n{language}, {when}", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("tokens")
    panels[0, 0].set_ylabel("depth")
    panels[1, 0].set_ylabel("depth")
    figure.colorbar(image, ax=panels.ravel().tolist(), label="share")
    figure.savefig(path, dpi=110)
    return True
