"""Small bar charts that a stage leaves beside its result; the same figures give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def bars(path: Path, title: str, series: Mapping[str, Mapping[str, float]], unit: str, log: bool = False) -> None:
    """Horizontal bars: one group a label, one bar a series; labels in the order of the first series that has them."""
    from matplotlib.figure import Figure  # no pyplot: it keeps figures and picks a backend for the whole process

    labels = list(dict.fromkeys(label for values in series.values() for label in values))
    figure = Figure(figsize=(7, 1 + 0.28 * max(len(labels), 3)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(len(series), 1)
    for number, (name, values) in enumerate(series.items()):
        places = [place + number * height for place in range(len(labels))]
        axes.barh(places, [values.get(label, 0) for label in labels], height, label=name)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(labels))], labels)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.set_xlabel(unit)
    if log:
        axes.set_xscale("log")
    if len(series) > 1:
        axes.legend()
    figure.savefig(path, dpi=90, metadata={"Software": None})
