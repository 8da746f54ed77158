"""The Ray session: a map over items and one SPMD program, with real workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from sample_stages import write_to_full_device
from sample_workers import (
    die,
    fail_at_three,
    rank_one_fails,
    rank_one_fails_alone,
    rank_one_is_killed,
    slow_first,
    square,
    sum_of_ranks,
    who,
    world_size,
)

from infra.errors import ConfigError, InputError, StageFailed
from infra.metrics import METRICS, Progress, read_metrics
from infra.ray import ray_map, spmd
from infra.stage import Context

pytestmark = pytest.mark.usefixtures("ray_session")


def test_ray_map_yields_in_the_order_of_the_items_whoever_ends_first(tmp_path: Path) -> None:
    seen: list[Progress] = []
    ctx = Context.local(tmp_path)
    ctx._log.on_progress = seen.append
    assert list(ray_map(slow_first, range(12), ctx, unit="files")) == list(range(12))
    assert [(p.done, p.total, p.unit) for p in seen] == [(n, 12, "files") for n in range(1, 13)]


def test_ray_map_takes_from_a_lazy_source_no_more_than_it_has_in_flight() -> None:
    taken: list[int] = []

    def source():
        for n in range(1000):
            taken.append(n)
            yield n

    results = ray_map(square, source(), total=1000)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    results.close()
    assert len(taken) <= 3 + 2 * ray.cluster_resources()["CPU"]


def test_an_error_in_ray_map_is_raised_as_itself() -> None:
    results = ray_map(fail_at_three, range(6))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="shard 3 is not parquet") as told:
        next(results)
    assert type(told.value) is InputError


def test_an_operating_system_error_keeps_its_number() -> None:
    with pytest.raises(OSError, match="No space left") as told:
        list(ray_map(write_to_full_device, [0]))
    assert told.value.errno == 28
    assert type(told.value) is OSError


def test_two_ranks_add_their_tensors_and_rank_zero_reports(tmp_path: Path) -> None:
    ctx = Context.local(tmp_path, workers=2)
    results = spmd(sum_of_ranks, {"offset": 10}, ctx)
    assert results == [(0, 21.0, 2), (1, 21.0, 2)]
    rows = read_metrics(ctx.scratch / METRICS)
    assert [(row["step"], row["value"]) for row in rows] == [(1, 21.0), (2, 21.0), (3, 21.0)]


def test_one_worker_takes_the_same_path(tmp_path: Path) -> None:
    assert spmd(sum_of_ranks, {"offset": 10}, Context.local(tmp_path), workers=1) == [(0, 10.0, 1)]


@pytest.mark.parametrize("worker", [rank_one_fails, rank_one_fails_alone])
def test_the_rank_that_failed_first_is_raised_as_itself_and_the_others_are_freed(worker: Any, tmp_path: Path) -> None:
    ctx = Context.local(tmp_path, workers=2)
    with pytest.raises(ZeroDivisionError, match="rank 1 met a bad batch"):
        spmd(worker, None, ctx)
    assert len(spmd(sum_of_ranks, {"offset": 0}, ctx)) == 2, "a rank of the failed job still holds its CPU"


@pytest.mark.parametrize(("worker", "workers"), [(die, 1), (rank_one_is_killed, 2)])
def test_a_killed_worker_is_stage_failed(worker: Any, workers: int, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"worker died.*run again to resume"):
        spmd(worker, None, Context.local(tmp_path), workers=workers)


def test_a_map_closed_in_the_middle_leaves_the_driver_and_the_workers_alive() -> None:
    """Cancelling a task that is just being started aborts the driver, so this is done many times."""
    for n in range(25):
        results = ray_map(square, range(20))
        assert [next(results) for _ in range(1 + n % 5)] == [k * k for k in range(1 + n % 5)]
        results.close()
    assert list(ray_map(square, range(4))) == [0, 1, 4, 9]


def test_a_worker_keeps_nothing_of_the_last_job() -> None:
    assert set(ray_map(world_size, range(8))) == {None}


def test_ranks_that_are_not_kept_end_with_their_job(tmp_path: Path) -> None:
    ranks = spmd(who, None, Context.local(tmp_path, workers=2), keep=False)
    until = time.monotonic() + 30
    while any(psutil.pid_exists(rank) for rank in ranks):
        assert time.monotonic() < until, f"of {ranks} one still waits for work"
        time.sleep(0.1)


def test_more_workers_than_the_cluster_has_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"9999 workers .* lower workers"):
        spmd(sum_of_ranks, {"offset": 0}, Context.local(tmp_path), workers=9999)


def test_there_are_no_more_ranks_than_gpus(tmp_path: Path) -> None:
    program = (
        "import ray, sys; from pathlib import Path; from sample_workers import sum_of_ranks\n"
        "from infra.ray import most_ranks, spmd; from infra.stage import Context\n"
        "ray.init(num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)\n"
        "ctx = Context.local(Path(sys.argv[1]))\n"
        "print('ranks', most_ranks(4), len(spmd(sum_of_ranks, {'offset': 0}, ctx, workers=4)))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert "ranks 1 1" in done.stdout, done.stderr


def test_ray_address_joins_a_running_cluster() -> None:
    code = (
        "import ray; from infra.ray import ray_map; from sample_workers import square\n"
        "print(list(ray_map(square, [3])), ray.get_runtime_context().gcs_address)"
    )
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"RAY_ADDRESS": address}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["[9]", address], done.stderr


def test_a_local_ray_that_does_not_start_is_stage_failed(tmp_path: Path) -> None:
    deep = tmp_path / "deep" / ("x" * 100)  # Ray's sockets lie below, and their paths are limited
    done = subprocess.run(
        [sys.executable, "-c", "import infra.ray; infra.ray.session()"],
        env=os.environ | {"RAY_TMPDIR": str(deep)},
        capture_output=True,
        text=True,
    )
    assert "infra.errors.StageFailed: a local Ray did not start: " in done.stderr
