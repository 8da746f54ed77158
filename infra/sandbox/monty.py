"""Monty: a small Python written in Rust, in worker processes of its own. Half a millisecond a run, on every OS.

Its language is a subset (no standard input, no class inheritance, few modules), which suits short answers and
function-call tests. Extra: `sandbox`. Its sleeps are not counted as running, so a timer of ours ends a run in any case.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import threading
import time
from typing import Any

from infra.sandbox.probe import probe
from infra.sandbox.runner import Kind, Limits, Outcome


class MontyRunner:
    """Programs in the Monty subset, one session of a pool's worker each."""

    name = "monty"

    def obstacle(self) -> str | None:
        if importlib.util.find_spec("pydantic_monty") is None:
            return "needs the package pydantic-monty: pip install -e '.[sandbox]'"
        return probe(self)

    @functools.cached_property
    def _pool(self) -> Any:
        from pydantic_monty import Monty

        return Monty(feed_duration_limit_grace=0.5).__enter__()

    def run(self, program: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
        from pydantic_monty import MontyError

        if stdin:
            return Outcome("refused", "Monty programs have no standard input: choose the backend linux or wasm")
        limits = limits or Limits()
        seconds = limits.wall_seconds
        allowed = {
            "max_feed_duration_secs": min(seconds, limits.cpu_seconds),
            "max_total_sleep_secs": seconds,
            "max_memory": limits.memory_mb << 20,
        }
        output = Output(limits.output_bytes)
        start = time.monotonic()
        kind: Kind = "ok"
        reason = "ended by itself"
        try:
            checkout = self._pool.checkout(limits=allowed)
            with checkout as session, Deadline(session.worker_pid, seconds + 0.5) as deadline:
                start = time.monotonic()
                try:
                    session.feed_run(program, print_callback=output)
                except MontyError as error:
                    kind, reason = self._judge(error, limits, deadline.passed)
        except MontyError as error:  # of giving a killed worker back
            if kind == "ok":
                kind, reason = "error", f"the worker was lost: {error}"
        if output.full:
            kind, reason = "output", f"wrote more than {limits.output_bytes} bytes"
        stdout, stderr = ("".join(output.parts[name]) for name in ("stdout", "stderr"))
        return Outcome(kind, reason, stdout, stderr, round(time.monotonic() - start, 4))

    def _judge(self, error: Any, limits: Limits, late: bool) -> tuple[Kind, str]:
        told = str(error)
        if late or (told.startswith("TimeoutError: ") and " limit exceeded" in told):
            return "timeout", f"still ran after {limits.wall_seconds:g} s"
        if told.startswith("MemoryError"):
            return "memory", f"asked for more than {limits.memory_mb} MB"
        return "error", told[:300]


class Output:
    """What a program prints, up to a number of bytes a stream; then the run is stopped."""

    def __init__(self, limit: int) -> None:
        self.parts: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self.left = {"stdout": limit, "stderr": limit}
        self.full = False

    def __call__(self, stream: str, text: str) -> None:
        data = text.encode("utf-8", "replace")
        self.parts[stream].append(data[: self.left[stream]].decode("utf-8", "ignore"))
        self.full = self.full or len(data) > self.left[stream]
        self.left[stream] -= min(len(data), self.left[stream])
        if self.full:
            raise OverflowError("too much output")


class Deadline:
    """Kills a worker that is still at it after so many seconds."""

    def __init__(self, pid: int | None, seconds: float) -> None:
        self.pid, self.passed = pid, False
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._kill)
        self._timer.daemon = True

    def _kill(self) -> None:
        with self._lock:
            if self.pid is not None:
                self.passed = True
                os.kill(self.pid, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            self.pid = None  # from here on the worker may serve another run
