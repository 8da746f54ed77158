"""Which questions a step asks: functions of (seed, step), so that a resumed run needs no state for them."""

from __future__ import annotations

from functools import lru_cache
from random import Random

from stages.problems.problem import Problem


class Questions:
    """The pool in a new order each epoch, without repeats in between."""

    def __init__(self, pool: tuple[Problem, ...], a_step: int, seed: int) -> None:
        self.pool, self.a_step, self.seed = pool, a_step, seed
        self._order = lru_cache(maxsize=2)(self._shuffled)  # a step may cross from one epoch into the next

    def asked(self, step: int) -> list[Problem]:
        """The questions of step `step`, from 0."""
        found = []
        for position in range(step * self.a_step, (step + 1) * self.a_step):
            epoch, index = divmod(position, len(self.pool))
            found.append(self.pool[self._order(epoch)[index]])
        return found

    def spare(self, step: int) -> list[Problem]:
        """Those that the step does not ask, in an order of its own."""
        asked = {problem.id for problem in self.asked(step)}
        rest = [problem for problem in self.pool if problem.id not in asked]
        Random(f"{self.seed}/{step}/spare").shuffle(rest)
        return rest

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.pool)))
        Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
