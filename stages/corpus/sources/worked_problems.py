"""Problems with their worked solutions as running text: a corpus's mathematics, drawn from the train split only."""

from __future__ import annotations

from dataclasses import dataclass

from stages.corpus.sources import Raw


@dataclass(frozen=True)
class WorkedProblems:
    """`n` distinct problems; the held-out split's questions never enter a corpus."""

    families: tuple[str, ...]
    languages: tuple[str, ...]
    levels: tuple[int, ...]
    n: int
    seed: int
    name: str = "worked_problems"
    language: str | None = None
    domain: str = "math"
    license: str = "Apache-2.0"

    def versions(self) -> dict[str, str]:
        return {}

    def units(self) -> list[str]:
        return ["all"]

    def read(self, unit: str) -> list[Raw]:
        from stages.problems.registry import generate

        problems = generate(self.families, self.languages, self.n, self.seed, "train", self.levels or None)
        return [Raw(p.id, p.worked, p.language) for p in problems]
