"""A function over shards: in this process while there is little text, over Ray from there on, with equal results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from infra.ray import ray_map
from infra.stage import Context

Item = TypeVar("Item")
Result = TypeVar("Result")

RAY_BYTES = 32 << 20  # of compressed shards: below, the work ends before workers would have imported their libraries


def over_shards(
    fn: Callable[[Item], Result],
    items: Sequence[Item],
    ctx: Context,
    size: int,
    unit: str = "shards",
) -> Iterator[Result]:
    """Yield fn(item) in the items' order. `fn` must be picklable; `size` is the bytes that the items will read."""
    if ctx.workers > 1 and len(items) > 1 and size >= RAY_BYTES:
        yield from ray_map(fn, items, ctx, unit=unit)
        return
    for done, item in enumerate(items, 1):
        result = fn(item)
        ctx.report(done, len(items), unit)
        yield result


def bytes_of(paths: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in paths)
