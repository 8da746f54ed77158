"""What Ray workers run in tests. torch is imported where it is used: most workers start without it."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from infra.errors import InputError


def square(n: int) -> int:
    return n * n


def slow_first(n: int) -> int:
    time.sleep(0.4 if n == 0 else 0)
    return n


def fail_at_three(n: int) -> int:
    if n == 3:
        raise InputError("shard 3 is not parquet")
    return n


def die(_: Any, report: Any = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def who(_: Any, report: Any) -> int:
    return os.getpid()


def sum_of_ranks(job: dict[str, int], report: Any) -> tuple[int, float, int]:
    """Each rank gives rank + offset; all_reduce adds them."""
    import torch
    import torch.distributed as dist

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    value = torch.tensor(float(rank + job["offset"]))
    dist.all_reduce(value)
    for step in range(3):
        report(step + 1, 3, "steps", value=value.item())
    dist.destroy_process_group()
    return rank, value.item(), torch.get_num_threads() * world


def rank_one_fails(job: Any, report: Any) -> None:
    """Rank 0 waits in a collective that rank 1 never joins."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("rank 1 met a bad batch")
    dist.barrier()


def rank_one_is_killed(job: Any, report: Any) -> None:
    """Rank 0 loses its peer in a collective."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def rank_one_fails_alone(job: Any, report: Any) -> None:
    """Rank 0 sleeps in C, where no interrupt reaches it, and never hears of rank 1."""
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("rank 1 met a bad batch")
    threading.Event().wait(600)


def world_size(_: int) -> str | None:
    return os.environ.get("WORLD_SIZE")
