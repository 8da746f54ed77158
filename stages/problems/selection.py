"""Which problems of an artifact a stage uses: the same four questions in training, sampling and evaluation."""

from __future__ import annotations

from collections.abc import Iterable

from infra.config import Config, Field, nearest
from infra.errors import ConfigError
from stages.problems.problem import Language, Problem
from stages.problems.verify import require


class ProblemFilter(Config):
    """Empty families and levels mean all of them."""

    families: tuple[str, ...] = Field(
        (), title="Families", description="Of ours, of reasoning-gym's, or the name of an import; empty: all"
    )
    languages: tuple[Language, ...] = Field(("en", "zh"), min_length=1, title="Languages")
    levels: tuple[int, ...] = Field((), title="Levels", description="Empty: all")
    limit: int | None = Field(None, ge=1, title="At most", description="The first so many that pass; None: all")

    def select(self, problems: Iterable[Problem]) -> tuple[Problem, ...]:
        """Those that pass; `ConfigError` if none is of a family that is named, or if one of them needs a verifier that
        does not work here."""
        held: set[str] = set()
        chosen = []
        for problem in problems:
            held.add(problem.family)
            if (
                (not self.families or problem.family in self.families)
                and problem.language in self.languages
                and (not self.levels or problem.level in self.levels)
            ):
                chosen.append(problem)
        for name in self.families:
            if name not in held:
                raise ConfigError(f"problems.families: no problem is of {name!r}; {nearest(name, held)}")
        selected = tuple(chosen[: self.limit])
        require(selected)
        return selected
