"""`fathom up`: a server, a worker and every deployment, which do the same work as the command line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from flows import services
from infra.settings import Settings
from infra.store import ArtifactStore


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read() or b"null")


@pytest.mark.slow
def test_a_run_through_the_server_makes_the_same_artifact_as_the_command_line(tmp_path: Path) -> None:
    environment = {
        **{
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PREFECT_", "PYTEST_", "NICEGUI_"))
        },
        "FATHOM_STORE": str(tmp_path / "store"),
        "FATHOM_PREFECT_PORT": str(free_port()),
        "FATHOM_EXPLORER_PORT": str(free_port()),
    }

    def fathom(*arguments: str) -> str:
        command = [sys.executable, "-m", "flows.cli", *arguments]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    try:
        assert environment["FATHOM_PREFECT_PORT"] in fathom("up")
        api = f"http://127.0.0.1:{environment['FATHOM_PREFECT_PORT']}/api"
        deployments = post(f"{api}/deployments/filter", {"limit": 200})
        entrypoints = {deployment["entrypoint"]: deployment["id"] for deployment in deployments}
        assert "flows.pipeline_flows.line" in entrypoints

        config = {"n_train": 30, "n_heldout": 6}
        run = post(
            f"{api}/deployments/{entrypoints['flows.stages.generate_problems']}/create_flow_run",
            {"parameters": {"config": config, "inputs": {}}},
        )
        state = _final_state(f"{api}/flow_runs/{run['id']}")
        assert (state["type"], state["name"]) == ("COMPLETED", "Completed"), state
        store = ArtifactStore(tmp_path / "store")
        made = store.ids()
        assert [artifact_id.partition("/")[0] for artifact_id in made] == ["generate_problems"]

        output = fathom("stage", "generate_problems", "--set", "n_train=30", "--set", "n_heldout=6")
        assert "reused" in output
        assert store.ids() == made
        runs = post(f"{api}/flow_runs/filter", {})
        assert sorted(found["state"]["name"] for found in runs) == ["Completed", "Reused"]
        automations = post(f"{api}/automations/filter", {})
        assert any("heartbeat" in automation["name"] for automation in automations)
    finally:
        stopped = fathom("down")
    assert "server" in stopped
    assert "worker" in stopped


def test_a_service_is_running_only_as_the_process_that_was_started(tmp_path: Path) -> None:
    service = services._Service("server", tmp_path)
    assert service.pid() is None
    record = {"pid": os.getpid(), "marker": "pytest"}
    service.file.write_text(json.dumps(record))
    assert service.pid() == os.getpid()
    service.file.write_text(json.dumps({**record, "marker": "another command"}))
    assert service.pid() is None
    service.file.write_text(json.dumps({**record, "pid": 2**22 + 1}))
    assert service.pid() is None


def test_services_get_every_setting(tmp_path: Path) -> None:
    settings = Settings(store=str(tmp_path), cost_per_hour=2.5, object_store_mb=300)
    found = services._environment(settings, ArtifactStore(tmp_path), "http://127.0.0.1:1/api")
    assert (found["FATHOM_COST_PER_HOUR"], found["FATHOM_OBJECT_STORE_MB"]) == ("2.5", "300")
    assert (found["FATHOM_STORE"], found["FATHOM_WORKSPACE"]) == (str(tmp_path), str(tmp_path))
    assert "FATHOM_RAY_ADDRESS" not in found


def _final_state(url: str) -> dict[str, Any]:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        with urllib.request.urlopen(url, timeout=30) as response:
            state = json.loads(response.read())["state"]
        if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return state
        time.sleep(1)
    raise AssertionError(f"still {state['name']}")
