"""Append-only metrics and progress: one row a report, in JSON Lines, that survives a kill and a resume."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

METRICS = "metrics.jsonl"


class Report(Protocol):
    """What long work calls as it goes: `done` of `total` units, and whatever was measured since."""

    def __call__(self, done: int, total: int, unit: str, **metrics: float) -> None: ...


@dataclass(frozen=True)
class Progress:
    """How far a stage is: counts, rate a second, seconds left."""

    done: int
    total: int
    unit: str
    rate: float
    eta_seconds: float | None
    metrics: dict[str, float]

    def __str__(self) -> str:
        percent = 100 * self.done / max(self.total, 1)
        left = "" if self.eta_seconds is None else f", {_clock(self.eta_seconds)} left"
        shown = " ".join(f"{key} {value:.4g}" for key, value in list(self.metrics.items())[:3])
        return f"{self.done}/{self.total} {self.unit} ({percent:.0f} %, {self.rate:.3g}/s{left}) {shown}".rstrip()


@dataclass
class MetricsLog:
    """Writes rows `{"step": done, "time": seconds, **metrics}`; a resumed run overwrites what it does again.

    The first row that a process writes drops the rows of an earlier process from that step on.
    """

    path: Path
    on_progress: Callable[[Progress], None] | None = None
    _first: tuple[int, float] = field(default=(0, 0.0), init=False)  # where and when what is counted now began
    _last: tuple[str, int] | None = field(default=None, init=False)

    def report(self, done: int, total: int, unit: str, **metrics: float) -> None:
        """Record a row (if anything was measured) and tell the listener how far the work is."""
        now = time.monotonic()
        if self._last is None:
            self._rewind(done)
        if self._last is None or self._last[0] != unit or done < self._last[1]:  # another count begins
            self._first = (done, now)
        self._last = (unit, done)
        if metrics:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as handle:
                handle.write(json.dumps({"step": done, "time": round(time.time(), 3), **metrics}) + "\n")
        if self.on_progress:
            steps, seconds = done - self._first[0], now - self._first[1]
            rate = steps / seconds if seconds > 0 else 0.0
            eta = (total - done) / rate if rate > 0 else None
            self.on_progress(Progress(done, total, unit, rate, eta, dict(metrics)))

    def _rewind(self, step: int) -> None:
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] < step]
            new = self.path.with_suffix(".new")
            new.write_text("".join(json.dumps(row) + "\n" for row in kept))
            new.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line that a kill cut short is left out."""
    return parse_metrics(path.read_text()) if path.exists() else []


def parse_metrics(text: str) -> list[dict[str, Any]]:
    """Rows of a metrics file's text, up to the first line that is not whole."""
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"
