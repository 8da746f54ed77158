"""A function over shards: in this process with one worker, over Ray with more. The results' order never differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from infra.ray import ray_map
from infra.stage import Context

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_shards(
    fn: Callable[[Item], Result], items: Sequence[Item], ctx: Context, unit: str = "shards"
) -> Iterator[Result]:
    """Yield fn(item) in the items' order. `fn` must be picklable: a module's function, or a partial of one."""
    if ctx.workers > 1 and len(items) > 1:
        yield from ray_map(fn, items, ctx, unit=unit)
        return
    for done, item in enumerate(items, 1):
        result = fn(item)
        ctx.report(done, len(items), unit)
        yield result
