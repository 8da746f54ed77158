"""What every test has: one thread a process, no network, settings of nobody's, a Ray session ended with the run, and
processes of its own."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

HOME = tempfile.mkdtemp(prefix="fathom-tests-")

# Before anything imports torch, prefect or transformers: they read these once.
for name in [name for name in os.environ if name.startswith(("FATHOM_", "PREFECT_")) or name == "RAY_ADDRESS"]:
    del os.environ[name]
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "PREFECT_HOME": f"{HOME}/prefect",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLI_COLORS": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "MPLBACKEND": "Agg",
}


# A job that a shell puts in the background ignores SIGINT, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    if "ray" in sys.modules:
        from infra.ray import shutdown

        shutdown()
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_session() -> None:
    """A local Ray with two logical CPUs or more, shared by all tests of this process."""
    from infra.ray import session
    from infra.settings import Settings

    session(Settings(workers=2, object_store_mb=128))


PRELUDE = "import faulthandler, os, torch\nfaulthandler.enable()\nos.environ |= environment\ntorch.set_num_threads(1)\n"


@pytest.fixture
def start() -> Iterator[Callable[..., BaseProcess]]:
    """start(program, **names): a process that runs the program with those names defined.

    It is forked from a server that has imported torch and nothing else has run in: seconds less than a new interpreter.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stages.training.trainer"])
    running = []

    def run(program: str, environment: dict[str, str] | None = None, **names: object) -> BaseProcess:
        source = PRELUDE + textwrap.dedent(program)
        process = context.Process(target=exec, args=(source, {"environment": environment or {}, **names}))
        process.start()
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()


@pytest.fixture
def run_ranks(start) -> Callable[..., None]:
    """run_ranks(program, world, **names): the program in `world` processes with torchrun's environment, to its end."""

    def run(program: str, world: int = 2, **names: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [
            start(program, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **names) for rank in range(world)
        ]
        for process in ranks:
            process.join(timeout=120)
        assert [process.exitcode for process in ranks] == [0] * world

    return run


@pytest.fixture(scope="session")
def taught() -> Callable[..., Path]:
    """taught(folder, pairs, steps, mtp=False, **model): the checkpoint of a micro model with MLA, experts and MTP that
    has learnt (question, answer) pairs in the reply format."""
    import torch

    from model.config import ModelConfig
    from model.transformer import Transformer
    from stages.tokens.bpe import train
    from stages.tokens.chat_template import render
    from stages.training.checkpoint import save_model

    def teach(folder: Path, pairs: Iterable[tuple[str, str]], steps: int, mtp: bool = False, **model: Any) -> Path:
        tokenizer = train(["so Pull 0123456789." * 3], 280, digits="single", min_frequency=1)
        tokenizer.save(folder)
        torch.manual_seed(0)
        shape = {
            **{"vocab_size": tokenizer.vocab_size, "d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 64},
            **{"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "init_std": 0.05},
            **{"n_dense_layers": 1, "n_routed_experts": 4, "n_activated_experts": 2, "n_shared_experts": 1},
            **{"moe_d_ff": 16, "max_position": 64, "n_mtp": 1},
        }
        learner = Transformer(ModelConfig(**{**shape, **model}))
        optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2)
        conversations = [
            [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"<think>so</think><answer>{answer}</answer>"},
            ]
            for question, answer in pairs
        ]
        tokens_BT = torch.tensor([render(messages, tokenizer)[0] for messages in conversations])
        for _ in range(steps):
            output = learner(tokens_BT[:, :-1])
            loss = -output.log_probs(tokens_BT[:, 1:]).mean()
            if mtp:
                loss = loss - output.log_probs(tokens_BT[:, 2:], depth=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        save_model(folder, learner, None)
        return folder

    return teach
