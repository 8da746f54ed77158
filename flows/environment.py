"""The environment that Prefect, Ray and OpenMP read when they are imported: set it first, then import them.

Prefect's home lies in the store's workspace, so a checkout neither reads nor writes the user's own. With `fathom up`
running its server is used; otherwise Prefect starts a temporary one.
"""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path

from infra.errors import StoreError
from infra.settings import Settings
from infra.store import ArtifactStore

RUN = "run"  # process ids, addresses and logs of `fathom up`
SERVER = "address.json"
HEARTBEAT_SECONDS = 30  # of every run: the server calls one that stops crashed (deployments.crash_automation)


def open_store(settings: Settings) -> ArtifactStore:
    """The artifact store of the settings."""
    return ArtifactStore(settings.store, settings.workspace)


def run_folder(store: ArtifactStore) -> Path:
    """Where `fathom up` keeps its process ids, addresses and logs."""
    return store.work / RUN


def variables(store: ArtifactStore) -> dict[str, str]:
    """Environment variables of every process of ours."""
    return {
        "PREFECT_HOME": str(store.work / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def prepare(store: ArtifactStore, quiet: bool = True) -> None:
    """Set what is not set yet; call before the first import of prefect. `quiet` keeps its log off the terminal.

    The log still reaches the server, for the run's page.
    """
    values = variables(store)
    if quiet:
        values |= {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL", "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL"}
    if "PREFECT_API_URL" not in os.environ and (address := server_address(store)):
        values["PREFECT_API_URL"] = address
    for name, value in values.items():
        os.environ.setdefault(name, value)
    make_folder(store, Path(os.environ["PREFECT_HOME"]))  # Prefect makes the last folder only


def server_address(store: ArtifactStore) -> str | None:
    """The API address of the server that `fathom up` started, if it answers."""
    try:
        address = json.loads((run_folder(store) / SERVER).read_text())["api"]
    except (FileNotFoundError, KeyError, json.JSONDecodeError):
        return None
    except OSError as error:
        raise _unusable(store, error) from None
    return address if answers(f"{address}/health") else None


def make_folder(store: ArtifactStore, folder: Path) -> None:
    """Make a folder of the store's workspace; StoreError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(store, error) from None


def _unusable(store: ArtifactStore, error: OSError) -> StoreError:
    return StoreError(f"store {store.root}: {error}; set FATHOM_STORE to a folder that can be written")


def answers(url: str, seconds: float = 2.0) -> bool:
    """Whether an HTTP GET succeeds in time."""
    try:
        with urllib.request.urlopen(url, timeout=seconds) as response:
            return response.status < 400
    except OSError:
        return False


def explorer_address(settings: Settings) -> str:
    """Where `fathom up` serves the explorer."""
    return f"http://127.0.0.1:{settings.explorer_port}"
