"""`fathom up` on a store of the test's own, as a context: the command line beside it, and Prefect's API."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
RUN_SECONDS, RETRIES = 300, 30


@dataclass(frozen=True)
class Served:
    """What `served` yields. `address` is Prefect's, `folder` holds the store."""

    folder: Path
    address: str
    environment: dict[str, str]

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def fathom(self, *arguments: str) -> str:
        """Output of the command, which must succeed."""
        command = [sys.executable, "-m", "flows.cli", *arguments]
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.address}/api/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.loads(_answer(request) or b"null")

    def deployments(self) -> dict[str, str]:
        """Entrypoint → id."""
        return {found["entrypoint"]: found["id"] for found in self.post("deployments/filter", {"limit": 200})}

    def final_state(self, run: str) -> dict[str, Any]:
        """The state in which a flow run ends."""
        deadline = time.monotonic() + RUN_SECONDS
        while time.monotonic() < deadline:
            state = json.loads(_answer(f"{self.address}/api/flow_runs/{run}"))["state"]
            if state["type"] in FINAL:
                return state
            time.sleep(1)
        raise AssertionError(f"still {state['name']}")


def _answer(request: urllib.request.Request | str) -> bytes:
    """What the server says; asked again while its database is busy, as Prefect's own client does."""
    for _ in range(RETRIES):
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.read()
        except urllib.error.HTTPError as refused:
            if refused.code != HTTPStatus.SERVICE_UNAVAILABLE:
                raise
            time.sleep(1)
    raise AssertionError(f"the server stayed busy through {RETRIES} tries")


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """Server, worker and explorer on free ports, with nothing of the tests' own settings; all ended afterwards."""
    hidden = ("PREFECT_", "PYTEST_", "NICEGUI_")
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(hidden)},
        "FATHOM_STORE": str(folder / "store"),
        "FATHOM_PREFECT_PORT": str(port),
        "FATHOM_EXPLORER_PORT": str(free_port()),
    }
    found = Served(folder, f"http://127.0.0.1:{port}", environment)
    try:
        assert found.address in found.fathom("up")
        yield found
    finally:
        found.fathom("down")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
