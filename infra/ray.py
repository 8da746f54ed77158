"""The Ray session and the two ways in which stages use it: a map over shards, and one SPMD program.

`RAY_ADDRESS` or the setting `ray_address` names a cluster; without one a local Ray is started with as many logical
CPUs as the machine has cores, a capped object store and no dashboard. Single-worker and many-worker training take the
same path: one Ray task a rank with torchrun's environment, so a worker function also runs under `torchrun`.
Tasks, not actors: Ray keeps idle worker processes, so the next stage does not import torch again.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from infra.errors import ConfigError, FathomError, StageFailed
from infra.metrics import Report
from infra.settings import Settings, cores

POLL_SECONDS = 0.3
GRACE_SECONDS = 2.0  # for the other ranks to say why they failed, after the first did


def session(settings: Settings | None = None) -> None:
    """Connect to the cluster, or start a local Ray; do nothing if that was done."""
    import ray

    if ray.is_initialized():
        return
    settings = settings or Settings.load()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _keeping_sigterm():
        _connect(ray, settings)


@contextlib.contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Give SIGTERM back to whoever had it: ray.init takes it, and an orchestrator cancels a run by it."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _connect(ray: Any, settings: Settings) -> None:
    import torch

    address = settings.ray_address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(f"Ray at {address}: {error}; start it, or unset ray_address for a local one") from None
        return
    # A token file that any earlier Ray left behind turns authentication on; a private local session needs none.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    for tries_left in (1, 0):  # its processes may come up too late on a crowded machine, and in time at once afterwards
        try:
            ray.init(
                num_cpus=max(cores(), settings.workers),
                num_gpus=None if torch.cuda.is_available() else 0,  # Ray counts GPUs that torch has no build for
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                object_store_memory=_object_store_bytes(settings),
            )
            return
        except Exception as error:  # all that Ray raises when its processes are not up in 30 s
            if not tries_left:
                raise StageFailed(f"a local Ray did not start: {error}") from error
            ray.shutdown()


def shutdown() -> None:
    """End this process's Ray session and, if it was local, all its processes."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


def ray_map(
    fn: Callable[[Any], Any],
    items: Iterable[Any],
    ctx: Any = None,
    unit: str = "shards",
    total: int | None = None,
    threads: int = 1,
    share_gpus: bool = False,
) -> Iterator[Any]:
    """Yield fn(item) in order, computed by Ray tasks of `threads` CPUs each, with few items in flight.

    With `share_gpus` the tasks that run at once have an equal share of the GPUs each, if there are any: else none.
    `items` may be lazy. An exception of `fn` is raised here as itself; what is in flight then ends by itself, for
    `ray.cancel` of a task that is just being started aborts the driver (Ray 2.60, "task that was not pending").
    """
    import ray

    session()
    resources = ray.cluster_resources()
    at_once = max(1, int(resources.get("CPU", 1)) // threads)
    gpus = min(1.0, math.floor(1000 * resources.get("GPU", 0) / at_once) / 1000) if share_gpus else 0
    remote = ray.remote(_with_threads).options(num_cpus=threads, num_gpus=gpus, max_retries=2, retry_exceptions=False)
    items = list(items) if total is None else items
    total = len(items) if total is None else total  # type: ignore[arg-type]
    flight = 2 * at_once
    pending: list[Any] = []
    done = 0
    source = iter(items)
    while True:
        while len(pending) < flight and (item := next(source, _END)) is not _END:
            pending.append(remote.remote(fn, item, threads))
        if not pending:
            return
        result = _get(ray, pending.pop(0))
        done += 1
        if ctx is not None:
            ctx.report(done, total, unit)
        yield result


def most_ranks(workers: int) -> int:
    """`workers`, or as many as there are GPUs if these are fewer: each rank has one to itself."""
    import ray

    session()
    return min(workers, _gpus(ray) or workers)


def _gpus(ray: Any) -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def spmd(
    fn: Callable[[Any, Report], Any],
    job: Any,
    ctx: Any,
    workers: int | None = None,
    threads: int = 1,
    keep: bool = True,
) -> list[Any]:
    """Run fn(job, report) once a rank and return the results by rank.

    Each rank has RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT and joins the process group itself; where
    there are GPUs it has one to itself, so there are no more ranks than GPUs. Rank 0's reports reach `ctx.report`. The
    first failure ends every rank and is raised. Without `keep` no later task is given the ranks' processes: for what
    cannot be started twice in one.
    """
    import ray

    workers = most_ranks(workers or ctx.workers)
    resources = ray.cluster_resources()
    if resources.get("CPU", 0) < workers * threads:
        raise ConfigError(
            f"{workers} workers × {threads} CPUs, but Ray has {resources.get('CPU', 0):.0f}: lower workers"
        )
    gpus = 1 if _gpus(ray) else 0
    mailbox: Any = ray.remote(_Mailbox).options(num_cpus=0).remote()
    task = ray.remote(max_calls=0 if keep else 1)(_run_rank)
    rank_task = task.options(num_cpus=threads, num_gpus=gpus, max_retries=0)
    refs = [rank_task.remote(fn, job, mailbox, rank, workers, threads) for rank in range(workers)]
    try:
        waiting = list(refs)
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_SECONDS)
            _raise_first_failure(ray, refs, ready, mailbox)
            for done, total, unit, metrics in _get(ray, mailbox.drain.remote()):
                ctx.report(done, total, unit, **metrics)
        for done, total, unit, metrics in _get(ray, mailbox.drain.remote()):
            ctx.report(done, total, unit, **metrics)
        return list(ray.get(refs))
    finally:
        ray.kill(mailbox)  # and with it every rank that still runs, such as one that waits in a collective


_END = object()


class _Mailbox:
    """Carries rank 0's reports to the driver, and the rendezvous address to the other ranks."""

    def __init__(self) -> None:
        self.letters: list[tuple[int, int, str, dict[str, float]]] = []
        self.master: tuple[str, int] | None = None
        self.failed: int | None = None

    def post(self, done: int, total: int, unit: str, metrics: dict[str, float]) -> None:
        self.letters.append((done, total, unit, metrics))

    def drain(self) -> list[tuple[int, int, str, dict[str, float]]]:
        letters, self.letters = self.letters, []
        return letters

    def meet(self, master: tuple[str, int] | None = None) -> tuple[str, int] | None:
        self.master = master or self.master
        return self.master

    def fail(self, rank: int | None = None) -> int | None:
        self.failed = rank if self.failed is None else self.failed
        return self.failed


def _run_rank(fn: Callable[..., Any], job: Any, mailbox: Any, rank: int, workers: int, threads: int) -> Any:
    import ray

    master = ray.get(mailbox.meet.remote((ray.util.get_node_ip_address(), _free_port()) if rank == 0 else None))
    while master is None:
        time.sleep(0.02)
        master = ray.get(mailbox.meet.remote())
    local_rank = 0 if ray.get_gpu_ids() else rank  # Ray shows each worker its own GPU as device 0
    torchrun = {
        "RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": master[0],
        "MASTER_PORT": str(master[1]),
    }
    os.environ |= torchrun

    def report(done: int, total: int, unit: str, **metrics: float) -> None:
        if rank == 0:
            mailbox.post.remote(done, total, unit, metrics)

    done = threading.Event()
    threading.Thread(target=_die_with, args=(ray, mailbox, done), daemon=True).start()
    try:
        return _with_threads(lambda work: fn(work, report), job, threads)
    except Exception:
        ray.get(mailbox.fail.remote(rank))  # before the peers notice that this rank has left
        raise
    finally:
        done.set()
        _leave_group()
        for name in torchrun:
            os.environ.pop(name, None)


def _leave_group() -> None:
    """Ray keeps the process for later tasks: a rank that failed must not leave its process group to them."""
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _die_with(ray: Any, mailbox: Any, done: threading.Event) -> None:
    """End this worker process when the driver has given the job up, unless the rank is done before."""
    while not done.wait(POLL_SECONDS):
        try:
            ray.get(mailbox.meet.remote())
        except ray.exceptions.RayActorError:
            if not done.is_set():
                os._exit(1)
            return


def _raise_first_failure(ray: Any, refs: list[Any], ready: list[Any], mailbox: Any) -> None:
    """Raise what failed first: a rank that loses a peer fails as well, with less to say about why."""
    if not any(_failure(ray, ref) for ref in ready):
        return
    ended, _ = ray.wait(refs, num_returns=len(refs), timeout=GRACE_SECONDS)
    failures = {refs.index(ref): error for ref in ended if (error := _failure(ray, ref))}
    first = failures.get(_get(ray, mailbox.fail.remote()))
    killed = next((error for error in failures.values() if isinstance(error, StageFailed)), None)
    if killed and (first is None or isinstance(first, RuntimeError)):  # torch.distributed's errors are RuntimeErrors
        raise killed
    raise first or next(iter(failures.values()))


def _failure(ray: Any, ref: Any) -> Exception | None:
    try:
        _get(ray, ref)
    except Exception as error:
        return error
    return None


def _with_threads(fn: Callable[[Any], Any], item: Any, threads: int) -> Any:
    """fn(item) with torch held to `threads`: more OpenMP threads than free cores cost 10–100×."""
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:  # else it reads the variable, if fn imports it at all
        sys.modules["torch"].set_num_threads(threads)
    return fn(item)


def _get(ray: Any, ref: Any) -> Any:
    """ray.get that raises a task's own exception, and StageFailed when a worker process died."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause: Any = error
        while isinstance(cause, ray.exceptions.RayTaskError) and isinstance(cause.cause, Exception):
            cause = cause.cause  # itself, not Ray's look-alike: errno and the like must survive
        raise cause from (None if isinstance(cause, FathomError) else error)
    except ray.exceptions.RayError as error:  # a worker crashed, ran out of memory, or was lost with its node
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise StageFailed(f"a Ray worker died: {told}; run again to resume") from None


def _free_port() -> int:
    for _ in range(64):
        port = random.randint(20000, 29999)  # below Ray's own worker ports and the ephemeral range
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise StageFailed("no free TCP port between 20000 and 29999 for the process group")


def _object_store_bytes(settings: Settings) -> int:
    shm = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()
    return max(80 << 20, min(settings.object_store_mb << 20, shutil.disk_usage(shm).free // 2))
