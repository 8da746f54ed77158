"""What the command line prints: progress while a pipeline runs, and tables."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from flows.planning import Plan, Step
from infra.artifact import Artifact
from infra.metrics import Progress

LINE_SECONDS = 10.0  # between progress lines where there is no terminal to redraw
STATE_STYLE = {"reuse": "green", "run": "yellow", "blocked": "red"}


def console(stderr: bool = False) -> Console:
    """A console that never wraps machine-read output: wide where there is no terminal."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=160)


class RunView:
    """Prints a run as it goes: one line a node, and between them counts, rate and time left."""

    def __init__(self) -> None:
        self.console = console(stderr=True)
        self.rows: list[tuple[str, str, Artifact, float]] = []
        self._status: Status | None = None
        self._began = self._node_began = time.monotonic()
        self._printed = 0.0
        self._name, self._count = "", ""

    def planned(self, plan: Plan) -> None:
        steps = [step for step in plan.steps if step.chosen]
        runs = sum(step.state == "run" for step in steps)
        reused = sum(step.state == "reuse" for step in steps)
        self.console.print(f"{plan.pipeline.name}, recipe {plan.recipe}: {runs} to run, {reused} to reuse")

    def started(self, step: Step, number: int, total: int) -> None:
        self._name, self._count = step.node.name, f"[{number}/{total}] "
        self._node_began = time.monotonic()
        self._printed = 0.0
        why = f" ({'; '.join(step.why[:2])})" if step.state == "run" and step.why else ""
        if self.console.is_terminal:
            self._status = self.console.status(escape(f"{self._count}{self._name}{why}"))
            self._status.start()
        elif step.state == "run":
            self.console.print(escape(f"{self._count}{self._name}{why}"))

    def progress(self, progress: Progress) -> None:
        now = time.monotonic()
        text = escape(f"{self._count}{self._name}: {progress}, {now - self._node_began:.0f} s")
        if self._status:
            self._status.update(text)
        elif now - self._printed > LINE_SECONDS:
            self._printed = now
            self.console.print(text)

    def done(self, artifact: Artifact, reused: bool, drifted: bool) -> None:
        self.close()
        seconds = time.monotonic() - self._node_began
        name = self._name or artifact.manifest.stage
        how = "reused" if reused else f"made in {seconds:.1f} s"
        note = " (its code has changed since)" if drifted else ""
        self.console.print(escape(f"{self._count}{name}: {how}{note}  {artifact.id}"))
        self.rows.append((name, "reused" if reused else "made", artifact, seconds))

    def close(self) -> None:
        if self._status:
            self._status.stop()
            self._status = None

    def summary(self, where: Mapping[str, str]) -> None:
        """What was made, how good it is, where to look."""
        table = Table(
            "Node", "", "Artifact", "Result", "Seconds", title=f"{time.monotonic() - self._began:.0f} s in all"
        )
        for name, how, artifact, seconds in self.rows:
            table.add_row(name, how, artifact.id, escape(headline(artifact.summary)), f"{seconds:.1f}")
        self.console.print(table)
        for name, address in where.items():
            self.console.print(f"{name}: {address}")


def headline(summary: Mapping[str, Any], n: int = 4) -> str:
    """The first few metrics of a summary, which stages put first because they matter most."""
    return ", ".join(f"{key} {number(value)}" for key, value in list(summary.items())[:n])


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def quantity(count: float) -> str:
    """Parameters and tokens for people: 671B."""
    for unit in ("", "K", "M", "B"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


def plan_table(plan: Plan) -> Table:
    """Node, what would happen to it, its id, and why."""
    table = Table("Node", "State", "Artifact", "Why", title=f"{plan.pipeline.name}, recipe {plan.recipe}")
    for step in plan.steps:
        style = STATE_STYLE[step.state]
        why = "\n".join([*step.why[:5], *([f"and {len(step.why) - 5} more"] if len(step.why) > 5 else [])])
        table.add_row(step.node.name, f"[{style}]{step.state}[/]", step.id, escape(why))
    return table


def counts_table(plan: Plan) -> Table | None:
    """Size and cost of the models that a plan's nodes train from random weights; None where none does."""
    table = Table(
        *("Model", "Parameters", "Active", "Embedding", "Training tokens", "FLOPs a token", "FLOPs in all", "KV cache"),
        caption="Embedding includes the head; the cache is a token's in BF16",
    )
    for step in plan.steps:
        if (counts := step.counts) is None:
            continue
        mtp = f" with {quantity(counts.mtp_parameters)} of MTP" if counts.mtp_parameters else ""
        table.add_row(
            step.node.name,
            quantity(counts.parameters) + mtp,
            quantity(counts.active_parameters),
            quantity(counts.embedding_parameters),
            quantity(counts.training_tokens),
            f"{counts.training_flops_per_token:.3g}",
            f"{counts.training_flops:.3g}",
            size(counts.cache_bytes_per_token),
        )
    return table if table.rows else None


def rows_table(header: Iterable[str], rows: Iterable[Iterable[Any]], title: str | None = None) -> Table:
    """A plain table of anything."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table
