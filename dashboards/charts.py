"""Metrics rows as ECharts options: one chart a metric, any number of artifacts as its lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

POINTS = 1200  # a line; more is not seen at the width of a card
COLORS = ("#4f7cff", "#f2884b", "#2bb38a", "#b667e8", "#e05d7b", "#8a94a6")
NOT_METRICS = frozenset({"step", "time"})
MUTED = "#8a94a6"  # reads on white and on black, so that no chart depends on the theme
FAINT = "rgba(138,148,166,0.22)"

Rows = Sequence[Mapping[str, Any]]


def metric_names(rows: Rows) -> list[str]:
    """Names of the numeric metrics, in order of first appearance."""
    names: dict[str, None] = {}
    for row in rows:
        for key, value in row.items():
            if key not in NOT_METRICS and isinstance(value, int | float) and not isinstance(value, bool):
                names.setdefault(key)
    return list(names)


def points(rows: Rows, name: str, limit: int = POINTS) -> list[list[float]]:
    """[step, value] pairs of one metric, thinned evenly to `limit`, ends kept. NaN and infinity leave no point."""
    found = [
        [row["step"], row[name]]
        for row in rows
        if isinstance(row.get(name), int | float) and math.isfinite(row[name]) and "step" in row
    ]
    if len(found) <= limit:
        return found
    last = len(found) - 1
    return [found[round(i * last / (limit - 1))] for i in range(limit)]


def line_chart(name: str, runs: Mapping[str, Rows]) -> dict[str, Any]:
    """Options of one metric's chart; the legend appears with the second line."""
    axis = {"axisLabel": {"color": MUTED, "hideOverlap": True}, "axisLine": {"lineStyle": {"color": FAINT}}}
    series = []
    for color, (label, rows) in zip(COLORS * (1 + len(runs) // len(COLORS)), runs.items(), strict=False):
        data = points(rows, name)
        series.append(
            {
                "name": label,
                "type": "line",
                "data": data,
                "showSymbol": len(data) < 12,
                "symbolSize": 5,
                "lineStyle": {"width": 1.8},
                "itemStyle": {"color": color},
                "animation": False,
                "sampling": "lttb",
            }
        )
    several = len(runs) > 1
    return {
        "title": {"text": name, "left": 4, "top": 2, "textStyle": {"color": MUTED, "fontSize": 13, "fontWeight": 600}},
        "grid": {"left": 8, "right": 18, "top": 52 if several else 36, "bottom": 6, "containLabel": True},
        "tooltip": {"trigger": "axis", "confine": True},
        "toolbox": {"right": 4, "feature": {"dataZoom": {"yAxisIndex": "none"}, "saveAsImage": {"name": name}}}
        | {"itemSize": 12, "iconStyle": {"borderColor": MUTED}},
        "legend": {"show": several, "top": 24, "left": 4, "itemHeight": 8, "textStyle": {"color": MUTED}},
        "xAxis": {"type": "value", "min": "dataMin", "max": "dataMax", "splitLine": {"show": False}, **axis},
        "yAxis": {"type": "value", "scale": True, "splitLine": {"lineStyle": {"color": FAINT}}, **axis},
        "series": series,
    }
