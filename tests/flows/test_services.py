"""`fathom up`: a server, a worker and every deployment, which do the same work as the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest
from served import served

from flows import services
from infra.settings import Settings
from infra.store import ArtifactStore


@pytest.mark.slow
def test_a_run_through_the_server_makes_the_same_artifact_as_the_command_line(tmp_path: Path) -> None:
    with served(tmp_path) as up:
        deployments = up.deployments()
        assert "flows.pipeline_flows.line" in deployments

        run = up.post(
            f"deployments/{deployments['flows.stages.generate_problems']}/create_flow_run",
            {"parameters": {"config": {"n_train": 30, "n_heldout": 6}, "inputs": {}}},
        )
        state = up.final_state(run["id"])
        assert (state["type"], state["name"]) == ("COMPLETED", "Completed"), state
        store = ArtifactStore(up.store)
        made = store.ids()
        assert [artifact_id.partition("/")[0] for artifact_id in made] == ["generate_problems"]

        output = up.fathom("stage", "generate_problems", "--set", "n_train=30", "--set", "n_heldout=6")
        assert "reused" in output
        assert store.ids() == made
        runs = up.post("flow_runs/filter", {})
        assert sorted(found["state"]["name"] for found in runs) == ["Completed", "Reused"]
        automations = up.post("automations/filter", {})
        assert any("heartbeat" in automation["name"] for automation in automations)
        stopped = up.fathom("down")
        assert "server" in stopped
        assert "worker" in stopped


def test_a_service_is_running_only_as_the_process_that_was_started(tmp_path: Path) -> None:
    service = services._Service("server", tmp_path)
    assert service.pid() is None
    record = {"pid": os.getpid(), "marker": psutil.Process().cmdline()[0]}
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
