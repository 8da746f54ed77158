"""Every pipeline as a Prefect flow: `flows.pipeline_flows.line` is the flow of the pipeline `line`.

A pipeline plans first, and stops before anything runs if the plan is blocked. Then it calls its stages' flows one after
another: in its own process (embedded) or through their deployments, each on whatever work pool it was deployed to.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

from prefect import Flow, State
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Completed

import stages
from flows.deployments import DEPLOYMENT
from flows.environment import explorer_address, open_store
from flows.pipelines import PIPELINES, Load, Pipeline, nested
from flows.planning import Selection, Step, plan
from flows.progress import LISTENER
from flows.publish import create, explorer_link, table
from flows.recipes import RECIPES, Recipe, load_recipe
from flows.stages import end_ray_work, stage_flow
from infra.errors import StageFailed
from infra.settings import Settings

Mode = Literal["embedded", "deployments"]


def __getattr__(name: str) -> Flow[Any, Any]:
    if name not in PIPELINES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pipeline_flow(PIPELINES[name])


def flow_name(pipeline: Pipeline) -> str:
    """Name of a pipeline's flow, apart from a stage's of the same name."""
    return f"{pipeline.name}-pipeline"


def pipeline_flow(
    pipeline: Pipeline, recipes: Mapping[str, Recipe] | None = None, load: Load = stages.load
) -> Flow[Any, Any]:
    """The Prefect flow of a pipeline; `recipes` and `load` replace the project's own (for other lines and in tests)."""
    names = tuple(recipes or RECIPES)

    def run_pipeline(
        recipe: str,
        overrides: list[str],
        from_: str | None,
        until: str | None,
        only: str | None,
        force: list[str],
        mode: Mode,
    ) -> State:
        chosen = recipes[recipe] if recipes else load_recipe(recipe)
        return _run(pipeline, chosen, overrides, Selection(from_, until, only, tuple(force)), mode, load)

    node = Literal[tuple(pipeline.by_name)]  # type: ignore[valid-type]
    kinds: dict[str, tuple[Any, Any]] = {
        "recipe": (Literal[names], names[0]),
        "overrides": (list[str], []),
        "from_": (node | None, None),
        "until": (node | None, None),
        "only": (node | None, None),
        "force": (list[node], []),
        "mode": (Mode, "embedded"),
    }
    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(n, keyword, annotation=kind, default=d) for n, (kind, d) in kinds.items()]
    run_pipeline.__signature__ = inspect.Signature(parameters, return_annotation=State)  # type: ignore[attr-defined]
    run_pipeline.__annotations__ = {name: kind for name, (kind, _) in kinds.items()}
    run_pipeline.__name__ = run_pipeline.__qualname__ = pipeline.name
    run_pipeline.__doc__ = (
        f"{pipeline.doc}.\n\nArgs:\n"
        "    recipe: The values of every node's config.\n"
        "    overrides: Changes to the recipe, each node.field=value, for example pretrain.steps=200.\n"
        "    from_: Execute this node and all that follows again.\n"
        "    until: Stop after this node.\n"
        "    only: Execute this node alone, on its inputs as they are in the store.\n"
        "    force: Execute these nodes again inside an otherwise normal run.\n"
        "    mode: Run the stages in this process, or through their deployments."
    )
    return Flow(
        run_pipeline,
        name=flow_name(pipeline),
        description=pipeline.doc,
        persist_result=False,
        on_cancellation=[end_ray_work],
        on_crashed=[end_ray_work],
    )


def _run(
    pipeline: Pipeline, recipe: Recipe, overrides: list[str], selection: Selection, mode: Mode, load: Load
) -> State:
    settings = Settings.load()
    store = open_store(settings)
    planned = plan(pipeline, recipe, store, overrides, selection, load)
    listener = LISTENER.get()
    if listener:
        listener.planned(planned)
    if planned.problem:
        raise planned.problem
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None
    labels = {"pipeline": pipeline.name, "recipe": recipe.name, "pipeline_run": str(context.flow_run.id)}
    chosen = [step for step in planned.steps if step.chosen]
    reused = 0
    for number, step in enumerate(chosen, 1):
        if listener:
            listener.started(step, number, len(chosen))
        call = _embedded if mode == "embedded" else _deployed
        reused += call(step, {**labels, "node": step.node.name}) == "Reused"
    address = explorer_address(settings)
    rows = ((s.node.name, s.state, f"[`{s.id}`]({explorer_link(address, s.id)})", "; ".join(s.why)) for s in chosen)
    text = f"# {pipeline.name}, recipe {recipe.name}\n\n" + table(("Node", "Planned", "Artifact", "Why"), rows)
    create("markdown", f"pipeline-{pipeline.name}", text, pipeline.doc, context.flow_run.id)
    return Completed(message=f"{len(chosen) - reused} made, {reused} reused")


def _embedded(step: Step, labels: Mapping[str, str]) -> str | None:
    # Ending a run's heartbeat takes Prefect up to a second; what is only looked up does not need one.
    brief = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}) if step.state == "reuse" else nullcontext()
    with brief:
        flow = stage_flow(step.stage)
        inputs = nested(step.refs)
        state = flow(config=step.config, inputs=inputs, force=step.force, labels=dict(labels), return_state=True)
    if not state.is_completed():
        state.result()  # raises what the stage raised
    return state.name


def _deployed(step: Step, labels: Mapping[str, str]) -> str | None:
    parameters = {
        "config": step.config.model_dump(mode="json"),
        "inputs": nested(step.refs),
        "force": step.force,
        "labels": dict(labels),
    }
    name = f"{step.stage.name}/{DEPLOYMENT}"
    state = run_deployment(name, parameters=parameters, flow_run_name=step.node.name).state
    if state is None or not state.is_completed():
        found = f"{state.name}: {state.message}" if state else "unknown"
        raise StageFailed(f"{step.node.name}: its run through the deployment {name} ended as {found}")
    return state.name
