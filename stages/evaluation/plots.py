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
