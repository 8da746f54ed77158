"""Scoring replies: programs side by side, since each waits for processes of its own, and all else one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from infra.settings import cores
from stages.problems.problem import Problem
from stages.rl.rewards import Score

MOST = 8  # programs at once: one a core, for their limits are seconds of the clock too

Item = TypeVar("Item")


def score_all(judge: Callable[[Item], Score], items: Sequence[Item], problems: Sequence[Problem]) -> list[Score]:
    """`judge` of every item, in order; `problems` are what the items are about."""
    with ThreadPoolExecutor(min(MOST, cores())) as pool:  # which has no threads before it has work
        waiting = [
            pool.submit(judge, item) if problem.verifier == "code" else None
            for item, problem in zip(items, problems, strict=True)
        ]
        return [future.result() if future else judge(item) for future, item in zip(waiting, items, strict=True)]
