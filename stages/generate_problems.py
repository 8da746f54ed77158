"""Problems with exact answers, drawn from our own families and, if asked, from reasoning-gym's: what reinforcement
learning and evaluation ask."""

from __future__ import annotations

from collections import Counter

from pydantic import model_validator

from infra.config import Config, Field
from infra.stage import Context, Inputs, stage
from stages.problems.gym import GymFamily, generate_gym
from stages.problems.problem import Language, write_problems
from stages.problems.registry import WITHOUT_SANDBOX, FamilyName, generate


class GenerateProblemsConfig(Config):
    families: tuple[FamilyName, ...] = Field(
        WITHOUT_SANDBOX, title="Families", description="functions: programs, which run in a sandbox"
    )
    reasoning_gym: tuple[GymFamily, ...] = Field(
        (), title="reasoning-gym", description="Its families that a share of the problems is drawn from; in English"
    )
    languages: tuple[Language, ...] = Field(("en", "zh"), min_length=1, title="Languages")
    levels: tuple[int, ...] = Field((), title="Levels", description="Empty: all that each family has")
    n_train: int = Field(20_000, ge=1, title="Training problems")
    n_heldout: int = Field(400, ge=1, title="Held-out problems")
    seed: int = Field(0, title="Seed")

    @model_validator(mode="after")
    def _some_family(self) -> GenerateProblemsConfig:
        if not (self.families or self.reasoning_gym):
            raise ValueError("give families or reasoning_gym: there is nothing to draw from")
        return self


@stage(version=2, makes="problems")
def generate_problems(config: GenerateProblemsConfig, inputs: Inputs, ctx: Context) -> dict:
    """Draw distinct training and held-out problems; the split is a hash of the content, so no seed can leak."""
    summary: dict = {}
    done, total = 0, config.n_train + config.n_heldout
    for split, count in (("train", config.n_train), ("heldout", config.n_heldout)):
        of_gym = round(count * len(config.reasoning_gym) / (len(config.families) + len(config.reasoning_gym)))
        problems = generate_gym(config.reasoning_gym, of_gym, config.seed, split)
        if config.families:
            levels = config.levels or None
            ours = generate(config.families, config.languages, count - of_gym, config.seed, split, levels=levels)
            problems = ours + problems
        summary[f"n_{split}"] = write_problems(ctx.out / f"{split}.jsonl", problems)
        for (family, language), number in sorted(Counter((p.family, p.language) for p in problems).items()):
            summary[f"{split}_{family}_{language}"] = number
        done += len(problems)
        ctx.report(done, total, "problems")
    return summary
