"""Running a flow from the command line: Prefect's settings first, a view of the progress, what was made at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import typer

from flows.console import RunView
from flows.environment import explorer_address, open_store, prepare, server_address
from infra.config import Config
from infra.settings import Settings
from infra.stage import Stage

TERMINATED = 143


def run_stage(stage: Stage, config: Config, inputs: Mapping[str, str], force: bool = False) -> None:
    """Run one stage through Prefect, on artifact ids by role."""
    from flows.pipelines import nested

    flow = prepared("flows.stages", "stage_flow")(stage)
    watch(flow, config=config, inputs=nested(inputs), force=force)


def prepared(module: str, name: str) -> Any:
    """Something of a module that imports prefect, with the environment set first."""
    import importlib

    prepare(open_store(Settings.load()), quiet="FATHOM_DEBUG_LOG" not in os.environ)
    return getattr(importlib.import_module(module), name)


def watch(flow: Any, **parameters: Any) -> None:
    """Call a flow with a view of its progress, then say what was made and where to look."""
    from prefect.exceptions import TerminationSignal

    from flows.progress import LISTENER

    settings = Settings.load()
    view = RunView()
    token = LISTENER.set(view)
    try:
        flow(**parameters)
    except TerminationSignal:
        raise typer.Exit(TERMINATED) from None
    finally:
        LISTENER.reset(token)
        view.close()
        if "ray" in sys.modules:
            from infra.ray import shutdown

            shutdown()
    server = server_address(open_store(settings))
    where = {"show": "fathom artifacts show ID"}
    if server:
        where |= {"Prefect": server.removesuffix("/api"), "explorer": explorer_address(settings)}
    view.summary(where)
