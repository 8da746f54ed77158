"""Every stage as a Prefect flow: `flows.stages.pretrain` is the flow of the stage `pretrain`, built when asked for.

A flow takes the stage's config and its inputs (the form in Prefect's UI: a field a role, for an id or a tag) and
`force`. The store is the only cache: an artifact that exists is adopted and the run ends `Completed` under the name
`Reused`. Retries live here: once, and only if the stage's workers died; the second attempt resumes from the stage's
scratch.
"""

from __future__ import annotations

import inspect
import signal
from collections.abc import Mapping
from typing import Any

from prefect import Flow, State, Task, get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.states import Completed
from pydantic import ValidationError, create_model

import infra.ray
import stages
from flows.environment import explorer_address, open_store
from flows.pipelines import flat
from flows.planning import rebuilt
from flows.progress import LISTENER
from flows.promotion import settle
from flows.publish import ProgressBar, publish_page
from infra.config import Config, Field
from infra.errors import StageFailed, TamperedArtifact
from infra.metrics import Progress
from infra.settings import Settings
from infra.stage import Result, Stage, run
from infra.store import ArtifactStore

RETRIES = 1


def __getattr__(name: str) -> Flow[Any, Any]:
    """Import one stage, not all, when Prefect loads the entrypoint `flows.stages.NAME`."""
    if name not in stages.NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return stage_flow(stages.load(name))


def stage_flow(stage: Stage) -> Flow[Any, Any]:
    """The Prefect flow of a stage."""

    def run_stage(config: Config, inputs: Config, force: bool, labels: Mapping[str, str]) -> State:
        return _run(stage, config, flat(inputs.model_dump(exclude_none=True)), force, labels)

    inputs_type = _inputs_type(stage)
    parameters = {
        "config": (stage.config_type, _default(stage.config_type)),
        "inputs": (inputs_type, _default(inputs_type)),
        "force": (bool, False),
        "labels": (dict[str, str], {}),
    }
    keyword = inspect.Parameter.KEYWORD_ONLY  # any of them may be without a default
    run_stage.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, keyword, annotation=kind, default=d) for n, (kind, d) in parameters.items()],
        return_annotation=State,
    )
    run_stage.__annotations__ = {name: kind for name, (kind, _) in parameters.items()}
    run_stage.__name__ = run_stage.__qualname__ = stage.name
    run_stage.__doc__ = _doc(stage)
    return Flow(
        run_stage,
        name=stage.name,
        description=_doc(stage).partition("\n\nArgs:")[0],
        flow_run_name=_run_name,
        persist_result=False,
        on_cancellation=[end_ray_work],
        on_crashed=[end_ray_work],
    )


def _inputs_type(stage: Stage) -> type[Config]:
    """What the stage takes, as a form: a field a role; a role of many takes names with an id or a tag each."""
    fields: dict[str, Any] = {}
    for name, role in stage.takes.items():
        kind: Any = dict[str, str] if role.many else str
        about = {"description": f"Ids or tags of {role.kind}, by name" if role.many else f"Id or tag of {role.kind}"}
        fields[name] = (kind | None, Field(None, **about)) if role.optional else (kind, Field(**about))
    return create_model(f"{stage.config_type.__name__.removesuffix('Config')}Inputs", __base__=Config, **fields)


def _default(model: type[Config]) -> Any:
    """The model without any value given, with which the form opens; empty if it cannot do without."""
    try:
        return model()
    except ValidationError:
        return inspect.Parameter.empty


def end_ray_work(flow: Flow[Any, Any], flow_run: FlowRun, state: State) -> None:
    """End this process's Ray session. A local Ray also ends with its process, a cluster ends a lost driver's tasks."""
    infra.ray.shutdown()


def _doc(stage: Stage) -> str:
    """Description and parameters, in the form from which Prefect takes the form's texts."""
    roles = [
        f"{name}{'.NAME' if role.many else ''} ({role.kind}{', optional' if role.optional else ''})"
        for name, role in stage.takes.items()
    ]
    return (
        f"{inspect.getdoc(stage.fn) or stage.name}\n\nTakes {', '.join(roles) or 'nothing'}; makes {stage.makes}.\n\n"
        "Args:\n"
        "    config: What to compute. Every field is part of the artifact's identity.\n"
        "    inputs: What to compute it from.\n"
        "    force: Execute again even if the artifact exists.\n"
        "    labels: Recorded with the artifact; pipelines fill this in."
    )


def _run_name() -> str:
    """Node (or stage) of the run, as the UI lists it."""
    context = FlowRunContext.get()
    assert context is not None and context.flow is not None
    return (context.parameters or {}).get("labels", {}).get("node", context.flow.name)


def _run(stage: Stage, config: Config, inputs: Mapping[str, str], force: bool, labels: Mapping[str, str]) -> State:
    settings = Settings.load()
    store = open_store(settings)
    context = FlowRunContext.get()
    flow_run_id = context.flow_run.id if context and context.flow_run else None
    node = labels.get("node", stage.name)
    bar = ProgressBar(f"{node}-progress", flow_run_id)
    listener = LISTENER.get()

    def on_progress(progress: Progress) -> None:
        bar(progress)
        if listener:
            listener.progress(progress)

    recorded = {**labels, **({"flow_run": str(flow_run_id)} if flow_run_id else {})}

    def work() -> Result:
        try:
            return _adopt_or_run(
                stage, config, inputs, store, settings, force=force, labels=recorded, on_progress=on_progress
            )
        except StageFailed:
            infra.ray.shutdown()  # the retry starts from a whole session
            raise

    try:
        result = Task(
            work,
            name=stage.name,
            retries=RETRIES,
            retry_condition_fn=_workers_died,
            cache_policy=NO_CACHE,
            persist_result=False,
        )()
    except SystemExit as error:
        # Ray puts a SIGTERM handler of its own, which exits, in the place of Prefect's, which knows what was cancelled.
        if error.code == signal.SIGTERM:
            raise TerminationSignal(signal.SIGTERM) from None
        raise
    finally:
        bar.close()
    artifact = result.artifact
    store.tag(f"{node}@latest", artifact.id)
    if listener:
        listener.done(artifact, result.reused, result.drifted)
    publish_page(store, artifact, node, explorer_address(settings), flow_run_id)
    settle(store, artifact)
    if not result.reused:
        return Completed(message=f"Made {artifact.id}")
    drift = "; the stage's code has changed since" if result.drifted else ""
    return Completed(name="Reused", message=f"{artifact.id} was there{drift}")


def _adopt_or_run(
    stage: Stage, config: Config, inputs: Mapping[str, str], store: ArtifactStore, settings: Settings, **how: Any
) -> Result:
    """`infra.stage.run`; an artifact whose inputs were rebuilt under it with a different content is made again."""
    try:
        return run(stage, config, inputs, store, settings, **how)
    except TamperedArtifact:
        artifact_id = stage.id(config, {role: store.resolve(ref) for role, ref in inputs.items()})
        faults = store.verify(artifact_id) if store.exists(artifact_id) else []
        if not faults or not rebuilt(faults):
            raise
        get_run_logger().warning("%s is out of date: %s; making it again", artifact_id, faults[0].problem)
        return run(stage, config, inputs, store, settings, **{**how, "force": True})


def _workers_died(task: Task[Any, Any], task_run: TaskRun, state: State) -> bool:
    return isinstance(state.result(raise_on_failure=False), StageFailed)
