"""`fathom promote`: give a checkpoint a tag if its reports say that it is good enough."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.console import console
from flows.environment import open_store
from flows.watch import run_stage
from infra.settings import Settings


def promote(
    ref: Annotated[str, typer.Argument(metavar="ID_OR_TAG", help="A checkpoint.")],
    tag: Annotated[str, typer.Argument(help="What it earns, such as r1@released.")],
    report: Annotated[list[str], typer.Option(metavar="ID_OR_TAG", help="Of evaluate, probe or benchmark.")],
    require: Annotated[list[str], typer.Option(metavar="'MEASURE >= NUMBER'", help="Or <=; on the interval's end.")],
) -> None:
    """Tag a checkpoint only if every requirement holds for the bound of its interval; else say which failed, exit 9.

    The verdict is an artifact, with the checkpoint and the reports as its inputs.

    Example: fathom promote final_rl@latest r1@released --report evaluate_r1@latest --require "pass_1 >= 0.5"
    """
    import stages

    stage, store = stages.load("promote"), open_store(Settings.load())
    config = stage.config_type.parse({"tag": tag, "require": require})
    reports = {store.resolve(one) for one in report}
    names = {f"reports.{one.replace('/', '_')}": one for one in reports}
    run_stage(stage, config, {"checkpoint": store.resolve(ref), **names})
    console(stderr=True).print(f"{tag} → {store.resolve(tag)}")
