"""How kernels are timed: all candidates of a case in the same rounds, so that a warming or throttling chip hits all.

Each call is a replay of a CUDA graph, timed by its own pair of events behind a write of 192 MB that leaves nothing of
the operands in L2: the host's part is not in it, for us or for a peer (but for one that waits for the device, which no
graph can hold). A figure is the median over the rounds of the
median of their calls. Every output is checked first, on memory full of NaN.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 192 << 20
ROUNDS, ROUND_MS, FEWEST, MOST = 5, 30.0, 6, 30


@dataclass(frozen=True)
class Candidate:
    """`call` writes or returns the output; `into` is what it writes, poisoned before the check (None: it allocates).
    `adds` says that it adds to `into`, which then starts from zeros; `waits`, that it waits for the device."""

    name: str
    call: Callable[[], Any]
    into: Tensor | None = None
    adds: bool = False
    waits: bool = False


@dataclass
class Case:
    """Candidates for one job; the first is ours. `work` is its FLOPs or bytes, of which `metric` counts 1e12 or 1e9 a
    second; `moved` are the bytes of a product's operands and result, each once."""

    name: str
    metric: str
    work: float
    expected: Tensor | None = None
    tolerance: float = 0.0
    taken: Callable[[Any], Tensor] = lambda out: out
    moved: float | None = None
    candidates: list[Candidate] = field(default_factory=list)

    def add(self, name: str, call: Callable[[], Any], into: Tensor | None = None, **how: bool) -> None:
        self.candidates.append(Candidate(name, call, into, **how))

    def run(self) -> dict[str, Any]:
        """The row of results: what each reached, ours over each anchor, and the errors."""
        errors = {candidate.name: self.error(candidate) for candidate in self.candidates}
        calls = {each.name: each.call if each.waits else captured(each.call).replay for each in self.candidates}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                times[name].append(median_ms(call))
        unit = 1e9 if self.metric == "TFLOP/s" else 1e6
        ms = {name: statistics.median(taken) for name, taken in times.items()}
        speeds = {name: self.work / taken / unit for name, taken in ms.items()}
        ours, *anchors = speeds
        row = {"case": self.name, "metric": self.metric, "ours": speeds[ours]}
        row |= {"anchors": {name: speeds[name] for name in anchors}, "us": 1e3 * ms[ours]}
        row |= {"error": errors[ours], "spread": max(times[ours]) / min(times[ours]) - 1}
        row |= {"intensity": self.work / self.moved} if self.moved else {}
        print(line(row), flush=True)
        return row

    def error(self, candidate: Candidate) -> float | None:
        """How far a candidate is from what is expected, relatively; an AssertionError if too far."""
        if candidate.into is not None:
            candidate.into.fill_(0.0 if candidate.adds else float("nan"))
        out = candidate.call()
        torch.cuda.synchronize()
        if self.expected is None:
            return None
        out = self.taken(out if candidate.into is None else candidate.into).double()
        expected = self.expected.double()
        error = ((out - expected).norm() / expected.norm()).item()
        assert error <= self.tolerance, f"{self.name}, {candidate.name}: relative error {error:.1e}"
        return error


def line(row: dict[str, Any]) -> str:
    """A row as it is printed: speed, time, ratio to every anchor."""
    ratios = "  ".join(f"{row['ours'] / speed:5.2f} x {name}" for name, speed in row["anchors"].items())
    error = "" if row["error"] is None else f"  error {row['error']:.1e}"
    return f"{row['case']:44s} {row['us']:9.1f} us {row['ours']:8.0f} {row['metric']:8s} {ratios}{error}"


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """The call as a graph, after it has run once for whatever it compiles."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


_flush: Tensor | None = None


def median_ms(call: Callable[[], Any]) -> float:
    """Milliseconds of a call, for as many calls as ROUND_MS holds."""
    global _flush
    if _flush is None:
        _flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = int(min(max(ROUND_MS / (1e3 * (time.perf_counter() - began)), FEWEST), MOST))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        _flush.zero_()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)
