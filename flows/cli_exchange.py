"""`fathom export` and `fathom import`: checkpoints out to, and in from, the published formats."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from flows.console import console
from flows.environment import open_store
from flows.watch import run_stage
from infra.errors import ConfigError, InputError
from infra.metrics import METRICS
from infra.settings import Settings


def export(
    ref: Annotated[str, typer.Argument(metavar="ID_OR_TAG", help="A checkpoint.")],
    directory: Annotated[Path | None, typer.Argument(help="New or empty folder for a copy; default: none.")] = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="Weights in DeepSeek-V3's fp8 blocks.")] = False,
) -> None:
    """Write a checkpoint in the format that transformers and vLLM load.

    The export is an artifact; DIRECTORY gets a copy of its files.

    Example: fathom export final_rl@latest ./my-model
    """
    import stages

    if directory is not None and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is not an empty folder: give a new one")
    store = open_store(Settings.load())
    checkpoint = store.resolve(ref)
    if (kind := store.manifest(checkpoint).kind) != "checkpoint":
        raise InputError(f"{checkpoint} is a {kind}: export needs a checkpoint")
    stage = stages.load("export")
    config, inputs = stage.config_type.parse({"fp8": fp8}), {"checkpoint": checkpoint}
    run_stage(stage, config, inputs)
    if directory is None:
        return
    made = store.get(stage.id(config, inputs))
    for file in made.manifest.files:
        if file.path != METRICS:
            copy = directory / file.path
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made.path / file.path, copy)  # a link would let an edit reach into the store
    console(stderr=True).print(f"{directory} holds a copy of {made.id}")


def import_(
    directory: Annotated[Path, typer.Argument(help="With config.json, safetensors and tokenizer.json.")],
    tag: Annotated[str | None, typer.Option(help="Name the checkpoint, such as qwen@base.")] = None,
) -> None:
    """Read a published checkpoint (DeepSeek V2, V3, R1, Llama, Qwen2, Qwen3) as one that any stage can start from.

    Example: fathom import ./Qwen3-0.6B --tag qwen@base
    """
    import stages

    stage = stages.load("import_checkpoint")
    config = stage.config_type.parse({"path": str(directory.resolve())})
    artifact_id = stage.id(config, {})  # mistakes show before Prefect is started
    run_stage(stage, config, {})
    if tag is not None:
        open_store(Settings.load()).tag(tag, artifact_id)
        console(stderr=True).print(f"{tag} → {artifact_id}")
