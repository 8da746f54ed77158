"""`prefect.yaml` from the registry: one deployment a stage, one a pipeline, on the work pool `fathom`.

    python -m flows.deployments            # writes prefect.yaml
    prefect --no-prompt deploy --all       # registers all of it with the server

A stage that fills the machine has one run at a time of its deployment; further ones queue. The limit is a deployment's
own: two different such stages, or one that an embedded pipeline runs in its own process, can still run side by side.
The schedules are examples: present, and switched off.
`{{ $PWD }}` is the checkout that `prefect deploy` runs in; its worker must see the same folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import stages
from flows.environment import HEARTBEAT_SECONDS
from flows.pipelines import PIPELINES

POOL = "fathom"
DEPLOYMENT = "fathom"
LOST_SECONDS = 90
FILE = Path(__file__).resolve().parent.parent / "prefect.yaml"
HEADER = "# Generated from the registry of stages and pipelines by: python -m flows.deployments\n"

# Stages that take every core or the GPU: a second run of the same deployment waits for the first. It does not wait for
# other deployments' runs.
EXCLUSIVE = (
    *("pretrain", "extend_context", "scaling_laws", "sft", "grpo", "sample", "dpo", "train_reward_model"),
    *("label_steps", "train_process_reward_model", "distill", "evaluate", "probe", "benchmark"),
)
SCHEDULES = {"ingest": "0 2 * * *", "evaluate": "0 6 * * 1", "report": "0 7 * * 1"}


def document() -> dict[str, Any]:
    """The content of prefect.yaml."""
    return {
        "name": "fathom",
        "prefect-version": "3.8.8",
        "pull": [{"prefect.deployments.steps.set_working_directory": {"directory": "{{ $PWD }}"}}],
        "deployments": [*map(_stage, stages.NAMES), *map(_pipeline, PIPELINES)],
    }


def text() -> str:
    """prefect.yaml as it should be."""
    return HEADER + yaml.safe_dump(document(), sort_keys=False, allow_unicode=True, width=120)


def _deployment(entrypoint: str, tags: list[str], limit: int | None, cron: str | None) -> dict[str, Any]:
    made: dict[str, Any] = {"name": DEPLOYMENT, "entrypoint": entrypoint, "tags": tags}
    if limit:
        made["concurrency_limit"] = {"limit": limit, "collision_strategy": "ENQUEUE"}
    if cron:
        made["schedules"] = [{"cron": cron, "timezone": "UTC", "active": False}]
    variables = {
        "working_dir": "{{ $PWD }}",
        "env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS), "OMP_NUM_THREADS": "1"},
    }
    return {**made, "work_pool": {"name": POOL, "job_variables": variables}}


def _stage(name: str) -> dict[str, Any]:
    limit = 1 if name in EXCLUSIVE else None
    return _deployment(f"flows.stages.{name}", ["fathom", "stage"], limit, SCHEDULES.get(name))


def _pipeline(name: str) -> dict[str, Any]:
    return _deployment(f"flows.pipeline_flows.{name}", ["fathom", "pipeline"], 1, None)


def crash_automation() -> dict[str, Any]:
    """The automation (as the API takes it) that calls a run Crashed when its heartbeat stops.

    A killed worker cannot report its runs, and they would stay Running for ever. All our runs send heartbeats often
    enough; one that was started with Prefect's default of 180 s would be called crashed while it works.
    """
    ended = [
        f"prefect.flow-run.{state}" for state in ("Completed", "Reused", "Failed", "TimedOut", "Cancelled", "Crashed")
    ]
    return {
        "name": "fathom: runs whose heartbeat stopped have crashed",
        "description": f"No heartbeat and no final state for {LOST_SECONDS} s",
        "enabled": True,
        "trigger": {
            "type": "event",
            "posture": "Proactive",
            "match": {"prefect.resource.id": "prefect.flow-run.*"},
            "after": ["prefect.flow-run.heartbeat"],
            "expect": ["prefect.flow-run.heartbeat", *ended],
            "for_each": ["prefect.resource.id"],
            "threshold": 1,
            "within": LOST_SECONDS,
        },
        "actions": [
            {
                "type": "change-flow-run-state",
                "state": "CRASHED",
                "name": "Crashed",
                "message": f"no heartbeat for {LOST_SECONDS} s: its process is gone",
            }
        ],
    }


if __name__ == "__main__":
    FILE.write_text(text())
