"""Three small real stages and a pipeline of them, run through the real store, Ray and Prefect."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

from flows.pipelines import Node, Pipeline
from flows.recipes import Recipe
from infra.config import Config, Field, nearest
from infra.errors import ConfigError
from infra.ray import ray_map
from infra.stage import Context, Inputs, Stage, many, optional, stage


class Shape(Config):
    width: int = Field(2, ge=1, title="Width", description="Numbers a row")
    height: int = Field(3, ge=1, title="Height")


class CountConfig(Config):
    shape: Shape = Field(Shape(width=4), title="Shape")
    order: Literal["up", "down"] = Field("up", title="Order")
    seconds: float = Field(0.0, ge=0, title="Seconds a row")
    seed: int = Field(0, title="Seed")


class SquareConfig(Config):
    power: int = Field(2, ge=1, le=9, title="Power")
    seconds: float = Field(0.0, ge=0, title="Seconds a number")


class SumConfig(Config):
    title: str = Field("sum", title="Title")


@stage(version=1, makes="documents")
def count(config: CountConfig, inputs: Inputs, ctx: Context) -> dict:
    """Write the numbers of a shape."""
    n = config.shape.width * config.shape.height
    numbers = [str(i) for i in range(n)]
    (ctx.out / "numbers.txt").write_text("\n".join(numbers if config.order == "up" else numbers[::-1]))
    for row in range(config.shape.height):
        time.sleep(config.seconds)
        ctx.report(row + 1, config.shape.height, "rows", width=config.shape.width)
    return {"numbers": n, "seed": config.seed}


def power(job: tuple[int, int, float]) -> int:
    time.sleep(job[2])
    return job[0] ** job[1]


@stage(version=1, takes={"numbers": "documents", "hint": optional("documents")}, makes="documents")
def square(config: SquareConfig, inputs: Inputs, ctx: Context) -> dict:
    """Raise every number to a power, on Ray."""
    numbers = [int(line) for line in (inputs["numbers"].path / "numbers.txt").read_text().split()]
    jobs = [(number, config.power, config.seconds) for number in numbers]
    powers = list(ray_map(power, jobs, ctx, unit="numbers"))
    (ctx.out / "numbers.txt").write_text("\n".join(map(str, powers)))
    _plot(ctx.out / "powers.png", powers)
    return {"largest": max(powers), "mean": sum(powers) / len(powers)}


@stage(version=1, takes={"parts": many("documents")}, makes="report")
def total(config: SumConfig, inputs: Inputs, ctx: Context) -> dict:
    """Add all numbers of all parts."""
    files = [part.path / "numbers.txt" for part in inputs["parts"]]
    value = sum(int(line) for file in files for line in file.read_text().split())
    (ctx.out / "report.json").write_text(f'{{"total": {value}}}')
    return {"total": value, "parts": len(files)}


STAGES = {"count": count, "square": square, "total": total}


def load(name: str) -> Stage:
    if name not in STAGES:
        raise ConfigError(f"no stage {name!r}; {nearest(name, STAGES)}")
    return STAGES[name]


TOY = Pipeline(
    "toy",
    "Numbers, their powers, the sum",
    (
        Node("small", "count"),
        Node("large", "count"),
        Node("squares", "square", {"numbers": "small"}),
        Node("cubes", "square", {"numbers": "large"}),
        Node("sums", "total", {"parts": {"squares": "squares", "cubes": "cubes"}}),
    ),
)
RECIPE = Recipe(
    "toy",
    "for tests",
    {"small": {"shape": {"height": 2}}, "large": {"order": "down"}, "cubes": {"power": 3}, "sums": {"title": "all"}},
)


def recipe(name: str) -> Recipe:
    return RECIPE


def _plot(path: Path, values: list[int]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.figure(figsize=(3, 2))
    pyplot.plot(values)
    pyplot.savefig(path, dpi=60)
    pyplot.close()
