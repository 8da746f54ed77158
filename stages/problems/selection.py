"""Which problems of an artifact a stage uses: the same four questions in training, sampling and evaluation."""

from __future__ import annotations

from collections.abc import Iterable

from infra.config import Config, Field
from stages.problems.problem import Language, Problem
from stages.problems.registry import FamilyName
from stages.problems.verify import require


class ProblemFilter(Config):
    """Empty families and levels mean all of them."""

    families: tuple[FamilyName, ...] = Field((), title="Families", description="Empty: all")
    languages: tuple[Language, ...] = Field(("en", "zh"), min_length=1, title="Languages")
    levels: tuple[int, ...] = Field((), title="Levels", description="Empty: all")
    limit: int | None = Field(None, ge=1, title="At most", description="The first so many that pass; None: all")

    def select(self, problems: Iterable[Problem]) -> tuple[Problem, ...]:
        """Those that pass; `ConfigError` if one of them needs a verifier that does not work here."""
        chosen = [
            problem
            for problem in problems
            if (not self.families or problem.family in self.families)
            and problem.language in self.languages
            and (not self.levels or problem.level in self.levels)
        ]
        selected = tuple(chosen[: self.limit])
        require(selected)
        return selected
