"""Commands that put a checkpoint to use."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from flows.environment import open_store
from infra.settings import Settings


class EngineName(StrEnum):
    native = "native"
    vllm = "vllm"


def serve(
    ref: Annotated[str, typer.Argument(metavar="ID_OR_TAG", help="A checkpoint.")],
    host: Annotated[str, typer.Option(help="0.0.0.0: every interface; nobody is asked for a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    engine: Annotated[EngineName | None, typer.Option(help="Default: vllm where it is installed.")] = None,
    speculate: Annotated[bool, typer.Option(help="Draft with the multi-token-prediction modules.")] = False,
    fp8: Annotated[bool, typer.Option(help="Compute (W8A8) and keep MLA's latents in float8; our own engine.")] = False,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests decoded at a time.")] = 64,
) -> None:
    """Answer OpenAI's HTTP API from a checkpoint, until Ctrl-C.

    Example: fathom serve final_rl@latest --engine native
    """
    from flows import serve as joint

    settings = Settings.load()
    joint.serve(
        open_store(settings),
        settings,
        ref,
        host=host,
        port=port,
        engine=engine.value if engine else None,
        speculate=speculate,
        fp8=fp8,
        max_batch=max_batch,
    )
