"""Which questions a step asks: functions of (seed, step), so that a resumed run needs no state for them."""

from __future__ import annotations

from functools import lru_cache
from random import Random

from stages.problems.problem import Problem


class Questions:
    """The pool in a new order each epoch, without repeats in between; those `beside` it are mixed into each step."""

    def __init__(
        self, pool: tuple[Problem, ...], a_step: int, seed: int | str, beside: Questions | None = None
    ) -> None:
        self.pool, self.a_step, self.seed, self.beside = pool, a_step, seed, beside
        self._order = lru_cache(maxsize=2)(self._shuffled)  # a step may cross from one epoch into the next

    def asked(self, step: int) -> list[Problem]:
        """The questions of step `step`, from 0."""
        found = self._of_pool(step)
        if self.beside:
            found += self.beside.asked(step)
            Random(f"{self.seed}/{step}/mixed").shuffle(found)
        return found

    def spare(self, step: int) -> list[Problem]:
        """Those of the pool that the step does not ask, in an order of its own."""
        asked = {problem.id for problem in self._of_pool(step)}
        rest = [problem for problem in self.pool if problem.id not in asked]
        Random(f"{self.seed}/{step}/spare").shuffle(rest)
        return rest

    def _of_pool(self, step: int) -> list[Problem]:
        found = []
        for position in range(step * self.a_step, (step + 1) * self.a_step):
            epoch, index = divmod(position, len(self.pool))
            found.append(self.pool[self._order(epoch)[index]])
        return found

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.pool)))
        Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
