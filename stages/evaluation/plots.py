"""Plain PNG plots for artifacts. Drawn without a display, with the object interface: no global figure state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Panel:
    title: str
    series: tuple[str, ...]


def plot_curves(path: Path, rows: Sequence[Mapping[str, Any]], panels: Sequence[Panel], x: str = "step") -> None:
    """One small plot a panel, three to a row; a series that no row has is left out."""
    figure = Figure(figsize=(12, 3.2 * -(-len(panels) // 3)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(-(-len(panels) // 3), 3, number)
        for name in panel.series:
            points = [(row[x], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(x)
        axes.grid(alpha=0.3)
        if len(panel.series) > 1:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_intervals(path: Path, labels: Sequence[str], values: Sequence[tuple[float, float, float]], title: str) -> None:
    """Horizontal points with their (value, low, high) intervals, first label on top."""
    figure = Figure(figsize=(8, 1.2 + 0.38 * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, (value, low, high) in enumerate(values):
        axes.plot([low, high], [-row, -row], color="tab:blue", linewidth=2)
        axes.plot([value], [-row], "o", color="tab:blue")
    axes.set_yticks([-row for row in range(len(labels))], labels=list(labels))
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_pass_and_maj(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """pass@k and maj@k side by side on one scale, a line with its band for each name's `scores.curve` rows."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left = None
    for column, (measure, title) in enumerate((("pass", "pass@k: any is right"), ("maj", "maj@k: the majority is"))):
        axes = left = figure.add_subplot(1, 2, column + 1, sharey=left)
        for name, rows in curves.items():
            ks = [row["k"] for row in rows]
            (line,) = axes.plot(ks, [row[measure] for row in rows], "o-", markersize=3, linewidth=1.2, label=name)
            bounds = [[row[f"{measure}_{end}"] for row in rows] for end in ("low", "high")]
            axes.fill_between(ks, *bounds, color=line.get_color(), alpha=0.12, linewidth=0)
        ticks = sorted({row["k"] for rows in curves.values() for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, labels=[str(k) for k in ticks])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("k samples")
        axes.grid(alpha=0.3)
    if len(curves) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
