"""`fathom up` and `fathom down`: Prefect's server, a worker with every deployment, and the explorer.

Each is a process in a session of its own, with a file of its process id and command and a log in the store's `run/`.
A service that already runs and answers is left alone, so `up` can be repeated.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from flows.deployments import FILE, POOL, crash_automation
from flows.environment import SERVER, answers, explorer_address, make_folder, run_folder, variables
from infra.errors import FathomError
from infra.settings import Settings
from infra.store import ArtifactStore

START_SECONDS = 120.0
STOP_SECONDS = 20.0
HOST = "127.0.0.1"
NAMES = ("explorer", "worker", "server")  # in the order in which they are stopped


class ServiceFailed(FathomError):
    """A service did not start; its log says why."""

    exit_code = 8


@dataclass(frozen=True)
class _Service:
    """A background process with a pid file and a log under `folder`."""

    name: str
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def pid(self) -> int | None:
        """The process id, if the process that we started still runs under it."""
        try:
            record = json.loads(self.file.read_text())
            command = " ".join(psutil.Process(record["pid"]).cmdline())
        except (FileNotFoundError, KeyError, json.JSONDecodeError, psutil.Error):
            return None
        return record["pid"] if record["marker"] in command else None

    def start(self, arguments: list[str], env: dict[str, str]) -> None:
        """Start `python -m arguments…` unless it runs."""
        if self.pid() is not None:
            return
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.file.write_text(json.dumps({"pid": process.pid, "marker": " ".join(arguments[:2])}))

    def wait(self, healthy: Callable[[], bool]) -> None:
        """Wait until it is healthy; ServiceFailed with the end of its log if it dies or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while not healthy():
            if self.pid() is None or time.monotonic() > deadline:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise ServiceFailed(f"{self.name} did not start (log: {self.log}):\n{tail}")
            time.sleep(0.3)

    def stop(self) -> bool:
        """End the process and all it started; whether it ran."""
        pid = self.pid()
        if pid is not None:
            os.killpg(pid, signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            while self.pid() is not None and time.monotonic() < deadline:
                _reap(pid)
                time.sleep(0.1)
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.file.unlink(missing_ok=True)
        return pid is not None


def up(settings: Settings, store: ArtifactStore, say: Callable[[str], Any]) -> None:
    """Start what does not run yet, wait until all of it is healthy, say where it is."""
    folder = run_folder(store)
    make_folder(store, folder)
    address = f"http://{HOST}:{settings.prefect_port}"
    api = f"{address}/api"
    env = _environment(settings, store, api)
    make_folder(store, Path(env["PREFECT_HOME"]))

    server = _Service("server", folder)
    if server.pid() is None and answers(f"{api}/health"):
        raise ServiceFailed(f"port {settings.prefect_port} is taken by another server: set FATHOM_PREFECT_PORT")
    server.start(["prefect", "server", "start", "--host", HOST, "--port", str(settings.prefect_port)], env)
    explorer = _Service("explorer", folder)
    has_explorer = find_spec("dashboards.app") is not None
    if has_explorer:
        explorer.start(["dashboards.app"], env)
    server.wait(lambda: answers(f"{api}/health"))
    (folder / SERVER).write_text(json.dumps({"api": api}))
    say(f"Prefect:  {address}")

    _prefect(["work-pool", "create", POOL, "--type", "process", "--overwrite"], env)
    _prefect(["--no-prompt", "deploy", "--all"], env)
    _automate(api)
    worker = _Service("worker", folder)
    worker.start(["prefect", "worker", "start", "--pool", POOL, "--name", POOL, "--type", "process"], env)
    worker.wait(lambda: _worker_online(api))
    say(f"worker:   pool {POOL}, log {worker.log}")
    if has_explorer:
        explorer.wait(lambda: answers(explorer_address(settings)))
        say(f"explorer: {explorer_address(settings)}")


def down(store: ArtifactStore) -> list[str]:
    """Stop what `up` started; names of what ran."""
    folder = run_folder(store)
    stopped = [name for name in NAMES if _Service(name, folder).stop()]
    (folder / SERVER).unlink(missing_ok=True)
    return stopped


def wait(store: ArtifactStore) -> None:
    """Stay until interrupted or terminated, then stop everything."""

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        while _Service("server", run_folder(store)).pid() is not None:
            time.sleep(1)
    finally:
        down(store)


def _environment(settings: Settings, store: ArtifactStore, api: str) -> dict[str, str]:
    """What the services see: our variables and settings, with the store by its absolute place: their folder differs."""
    place = store.root if store.local else settings.store
    given = {name: str(value) for name, value in settings.model_dump().items() if value is not None}
    given |= {"store": place, "workspace": str(store.work)}
    return {
        **os.environ,
        **variables(store),
        "PREFECT_API_URL": api,
        "PREFECT_UI_API_URL": api,
        **{f"FATHOM_{name.upper()}": value for name, value in given.items()},
        "PYTHONUNBUFFERED": "1",
    }


def _prefect(arguments: list[str], env: dict[str, str]) -> None:
    """Run Prefect's own command in the folder of prefect.yaml."""
    root = FILE.parent
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=root,
        env={**env, "PWD": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ServiceFailed(f"prefect {' '.join(arguments)}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _automate(api: str) -> None:
    """Create the crash automation if it is not there."""
    wanted = crash_automation()
    found = _post(f"{api}/automations/filter", {"automations": {"name": {"any_": [wanted["name"]]}}})
    if not found:
        _post(f"{api}/automations/", wanted)


def _worker_online(api: str) -> bool:
    workers = _post(f"{api}/work_pools/{POOL}/workers/filter", {})
    return any(worker["status"] == "ONLINE" for worker in workers)


def _post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read())


def _reap(pid: int) -> None:
    """Collect the exit of a child of this very process; other processes have init for that."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
