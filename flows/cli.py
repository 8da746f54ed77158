"""`fathom`: run pipelines and stages, plan them, look at what they made, talk to it.

Everything heavy is imported inside the command that needs it, so that a listing takes a second. Prefect reads its
settings when it is imported: `environment.prepare` comes before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flows import cli_artifacts, cli_exchange, cli_models, cli_promote
from flows.console import console, counts_table, plan_table
from flows.environment import open_store
from flows.watch import prepared, run_stage, watch
from infra.config import nearest
from infra.errors import ConfigError, FathomError
from infra.settings import Settings

INTERRUPTED = 130


class _Group(TyperGroup):
    """Turns a user's mistake into one message and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FathomError as error:
            if ctx.params.get("debug"):
                raise
            console(stderr=True).print(f"{type(error).__name__}: {error}", style="red", markup=False, soft_wrap=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            makes = ctx.invoked_subcommand in ("run", "stage", "export", "import", "promote")
            resumed = ": nothing half-made was kept; the same command goes on from here" if makes else ""
            console(stderr=True).print(f"interrupted{resumed}")
            ctx.exit(INTERRUPTED)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    help="Raw text to a reasoning model. Start with: [bold]fathom run line --recipe tiny[/]",
)
app.add_typer(cli_artifacts.app, name="artifacts")
app.command("export")(cli_exchange.export)
app.command("import")(cli_exchange.import_)
app.command("promote")(cli_promote.promote)
app.command("serve")(cli_models.serve)

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NODE.FIELD=VALUE", help="Change the recipe; the value is YAML.")
]
From = Annotated[str | None, typer.Option("--from", metavar="NODE", help="Execute it and all that follows again.")]
Until = Annotated[str | None, typer.Option(metavar="NODE", help="Make it and what it needs, no more.")]
Only = Annotated[str | None, typer.Option(metavar="NODE", help="Execute it alone, on what the store has.")]
Force = Annotated[list[str] | None, typer.Option(metavar="NODE", help="Execute it again in a normal run.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="tiny, h100, a published size or a reproduction.")]
PipelineName = Annotated[
    str, typer.Argument(metavar="PIPELINE", help="corpus, scaling, base, r1_zero, r1, distill, line or a branch of it.")
]


@app.callback()
def root(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and Prefect's log.")] = False) -> None:
    if debug:
        os.environ["FATHOM_DEBUG_LOG"] = "1"


@app.command()
def run(
    pipeline: PipelineName,
    recipe: RecipeName = "tiny",
    set_: Set = None,
    from_: From = None,
    until: Until = None,
    only: Only = None,
    force: Force = None,
    deployments: Annotated[bool, typer.Option(help="Run stages through their deployments (fathom up).")] = False,
) -> None:
    """Run a pipeline through Prefect; what exists is reused.

    Examples:

      fathom run line --recipe tiny

      fathom run base --set pretrain.steps=50 --set pretrain.model.d_model=96

      fathom run r1 --from reasoning_rl --until evaluate_reasoning_rl
    """
    from flows.pipelines import pipeline as find_pipeline
    from flows.planning import Selection
    from flows.recipes import load_recipe

    chosen = find_pipeline(pipeline)
    selection = Selection(from_, until, only, tuple(force or ()))
    selection.nodes(chosen)
    load_recipe(recipe).resolve(chosen, set_ or ())  # mistakes show before Prefect is started
    make_flow = prepared("flows.pipeline_flows", "pipeline_flow")
    if deployments and "PREFECT_API_URL" not in os.environ:
        raise ConfigError("--deployments needs a server and a worker: start them with fathom up")
    flow = make_flow(chosen)
    watch(
        flow,
        recipe=recipe,
        overrides=set_ or [],
        from_=from_,
        until=until,
        only=only,
        force=force or [],
        mode="deployments" if deployments else "embedded",
    )


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="A stage, such as pretrain.")],
    config: Annotated[Path | None, typer.Option(help="YAML, JSON or TOML file of the stage's config.")] = None,
    input_: Annotated[list[str] | None, typer.Option("--input", metavar="ROLE=ID_OR_TAG")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="YAML value.")] = None,
    force: Annotated[bool, typer.Option(help="Execute again even if the artifact exists.")] = False,
) -> None:
    """Run one stage through Prefect.

    Examples:

      fathom stage generate_problems --set n_train=500

      fathom stage evaluate --set name=r1 --input checkpoint=final_rl@latest --input problems=generate_problems@latest
    """
    import stages
    from flows.pipelines import Node, Pipeline
    from flows.recipes import Recipe

    found = stages.load(name)
    alone = Pipeline(name, found.doc, (Node(name, name),))
    recipe = Recipe(str(config or "defaults"), "", {name: _read_config(config) if config else {}})
    values = recipe.resolve(alone, [f"{name}.{change}" for change in set_ or ()])[name]
    inputs = dict(_pair(text) for text in input_ or ())
    found.check_roles(inputs)
    store = open_store(Settings.load())
    inputs = {role: store.resolve(ref) for role, ref in inputs.items()}
    run_stage(found, values, inputs, force)


@app.command()
def plan(
    pipeline: PipelineName,
    recipe: RecipeName = "tiny",
    set_: Set = None,
    from_: From = None,
    until: Until = None,
    only: Only = None,
    force: Force = None,
    as_json: Json = False,
) -> None:
    """Show what a run would do and why, without running anything.

    Recipes: tiny, h100, v1_67b, moe_2b, moe_16b, v2_lite, v2, v3; logic_rl and tiny_zero for imported_zero,
    open_r1 for imported_traces.

    Example: fathom plan line --set pretrain.steps=300
    """
    from flows.pipelines import pipeline as find_pipeline
    from flows.planning import Selection
    from flows.planning import plan as make_plan
    from flows.recipes import load_recipe

    selection = Selection(from_, until, only, tuple(force or ()))
    store = open_store(Settings.load())
    planned = make_plan(find_pipeline(pipeline), load_recipe(recipe), store, set_ or (), selection)
    if as_json:
        typer.echo(json.dumps([step.to_json() for step in planned.steps], indent=1, ensure_ascii=False))
    else:
        console().print(plan_table(planned))
        if (counts := counts_table(planned)) is not None:
            console().print(counts)
    if planned.problem:
        raise planned.problem


@app.command()
def chat(
    ref: Annotated[str, typer.Argument(metavar="ID_OR_TAG", help="A checkpoint.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this one question and exit.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.6,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.95,
    seed: int = 0,
) -> None:
    """Talk to a checkpoint; its thinking is shown dim.

    Example: fathom chat final_rl@latest --prompt "12 + 30 = ?"
    """
    from flows.chat import converse

    artifact = open_store(Settings.load()).check(ref)
    converse(artifact, prompt, max_new_tokens, temperature, top_p, seed)


@app.command()
def up(
    foreground: Annotated[bool, typer.Option(help="Stay, and end everything on Ctrl-C.")] = False,
) -> None:
    """Start the Prefect server, a worker with all deployments, and the explorer.

    Example: FATHOM_PREFECT_PORT=4300 fathom up
    """
    from flows import services

    settings = Settings.load()
    services.up(settings, open_store(settings), console(stderr=True).print)
    if foreground:
        services.wait(open_store(settings))


@app.command()
def down() -> None:
    """Stop what `fathom up` started."""
    from flows import services

    for name in services.down(open_store(Settings.load())):
        console(stderr=True).print(f"stopped {name}")


def _pair(text: str) -> tuple[str, str]:
    role, equals, ref = text.partition("=")
    if not (role and equals and ref):
        raise ConfigError(f"--input {text!r}: write it as role=id, for example checkpoint=pretrain@latest")
    return role, ref


def _read_config(path: Path) -> dict[str, Any]:
    """A config file as a dict, by its suffix."""
    import tomllib

    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    kinds = (".yaml", ".yml", ".json", ".toml")
    if path.suffix not in kinds:
        raise ConfigError(f"--config {path}: {nearest(path.suffix, kinds)}")
    try:
        if path.suffix == ".toml":
            return tomllib.loads(text)
        values = yaml.safe_load(text)  # JSON is YAML
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected a mapping of fields to values")
    return values


def main() -> None:
    """Entry point of the `fathom` command."""
    app()


if __name__ == "__main__":
    main()
