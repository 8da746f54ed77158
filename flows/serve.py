"""`fathom serve`: OpenAI's HTTP API on a checkpoint, by vLLM or by our own engine.

vLLM serves what the stage `export` writes (it is run, or its artifact reused), in processes of its own with the flags
that its version needs. Our own engine (`flows.server`) reads the checkpoint as it is. Both compute in fp32 on CPU and
in bf16 on CUDA, ours in fp8 if asked.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

import stages
from flows.console import console
from flows.services import ServiceFailed
from infra.artifact import Artifact
from infra.errors import InputError
from infra.settings import Settings
from infra.stage import run
from infra.store import ArtifactStore
from model.float8 import use_float8
from stages.rl.engines import vllm
from stages.tokens.bpe import load_tokenizer
from stages.tokens.chat_template import JINJA
from stages.tokens.tools import CALLS
from stages.training.checkpoint import load_config, load_model

if TYPE_CHECKING:
    from flows.server.engine import Engine

EngineName = Literal["native", "vllm"]
# What `vllm serve` runs. The command itself looks up its version under a name that the CPU build does not have.
VLLM_SERVE = "vllm.entrypoints.launchers.api_server.entry"
ENDED = (0, -signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def serve(
    store: ArtifactStore,
    settings: Settings,
    ref: str,
    *,
    host: str,
    port: int,
    engine: EngineName | None,
    speculate: bool,
    fp8: bool,
    max_batch: int,
) -> None:
    """Serve until interrupted. Without an engine named: ours for fp8 or where vLLM is not installed, else vLLM."""
    artifact = store.check(ref)
    if artifact.kind != "checkpoint":
        raise InputError(f"{artifact.id} is a {artifact.kind}: serve needs a checkpoint")
    if fp8 and engine == "vllm":
        raise InputError("--fp8 is our own engine's: use --engine native, or `vllm serve` what export --fp8 writes")
    chosen = engine or ("vllm" if importlib.util.find_spec("vllm") and not fp8 else "native")
    names = list(dict.fromkeys([ref, artifact.id]))
    console(stderr=True).print(f"{artifact.id} on http://{host}:{port}/v1, engine {chosen}; Ctrl-C ends it")
    with store.holding([artifact.id]):
        if chosen == "vllm":
            serve_vllm(store, settings, artifact, names, host, port, speculate, max_batch)
        else:
            import uvicorn

            from flows.server.app import Service, make_app

            own = native_engine(artifact.path, speculate=speculate, fp8=fp8, max_batch=max_batch)
            app = make_app(Service(own, load_tokenizer(artifact.path), names))
            uvicorn.run(app, host=host, port=port, log_level="warning")


def native_engine(folder: Path, *, speculate: bool, fp8: bool, max_batch: int) -> Engine:
    """Our own engine on a checkpoint, on the GPU if there is one; `fp8`: products and MLA's cache in float8."""
    from flows.server.engine import Engine

    model = load_model(folder)
    if torch.cuda.is_available():
        model = model.round_weights().cuda()
    if fp8:
        use_float8(model, always=True)
    return Engine(model, max_batch, speculate, "float8" if fp8 and model.config.is_mla else None)


def serve_vllm(
    store: ArtifactStore,
    settings: Settings,
    artifact: Artifact,
    names: list[str],
    host: str,
    port: int,
    speculate: bool,
    max_batch: int,
) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise InputError("vLLM is not installed (make setup installs the lock that has it): use --engine native")
    config = load_config(artifact.path)
    stage = stages.load("export")
    export = run(stage, stage.config_type(), {"checkpoint": artifact.id}, store, settings).artifact
    cpu = not torch.cuda.is_available()
    flags: dict[str, Any] = {
        "model": export.path,
        "host": host,
        "port": port,
        "max-model-len": config.max_position,
        "max-num-seqs": max_batch,
        "dtype": "float32" if cpu else "bfloat16",
        "compilation-config": json.dumps(vllm.COMPILATION),
        "reasoning-parser": "deepseek_r1",
    }
    tokenizer = load_tokenizer(artifact.path)
    tools = tokenizer.template == JINJA and len(tokenizer.encode(CALLS)) == 1  # the parser looks for the marks' ids
    if tools:
        flags["tool-call-parser"] = "deepseek_v31"
    if speculate:
        flags["speculative-config"] = json.dumps({"method": "mtp", "num_speculative_tokens": config.n_mtp})
    command = [sys.executable, "-m", VLLM_SERVE, "--served-model-name", *names, "--enable-prefix-caching"]
    command += ["--enforce-eager", f"--block-size={vllm.CPU_BLOCK}"] if cpu else []
    command += ["--enable-auto-tool-choice"] if tools else []
    command += [f"--{name}={value}" for name, value in flags.items()]
    with store.holding([export.id]):
        process = subprocess.Popen(command, env={**os.environ, **vllm.environment(config, cpu)})
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the terminal has told vLLM too
            code = process.wait()
    if code not in ENDED:
        raise ServiceFailed(f"vLLM ended with code {code}; its log above says why")
