"""The toy stages are a module of their own, so that Ray's workers and other processes can import it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from infra.store import ArtifactStore

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="session")
def made_store(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """A store in which the toy line was made, node by node, without Prefect. Copy it before changing it."""
    from toy import RECIPE, TOY, load

    from flows.planning import plan
    from infra.settings import Settings
    from infra.stage import run
    from infra.store import ArtifactStore

    root = tmp_path_factory.mktemp("made") / "store"
    store = ArtifactStore(root)
    for step in plan(TOY, RECIPE, store, load=load).steps:
        result = run(step.stage, step.config, step.refs, store, Settings(workers=2), labels={"node": step.node.name})
        assert result.artifact.id == step.id
        store.tag(f"{step.node.name}@latest", step.id)
    return root


@pytest.fixture
def store_copy(made_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_store, tmp_path / "store"))


@pytest.fixture
def fathom(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the command line, with the toy line registered, as a process of its own on a store under tmp_path."""

    def start(*arguments: str, script: str = "toy_fathom.py") -> subprocess.Popen[str]:
        store, home = str(tmp_path / "store"), str(tmp_path / "prefect")
        return subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            env={**os.environ, "FATHOM_STORE": store, "PREFECT_HOME": home},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory, taught: Callable[..., Path]) -> Path:
    """A checkpoint of a micro model with MLA, experts and MTP that answers any question in the reply format."""
    pairs = [(f"Pull {number}.", str(number)) for number in range(10)]
    # vLLM's CPU attention knows heads of this width, not of every.
    heads = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 24}
    return taught(tmp_path_factory.mktemp("chat"), pairs, steps=80, mtp=True, max_position=96, **heads)


@pytest.fixture(scope="session")
def chat_store(chat_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    """A store with that checkpoint under the tag arm@latest."""
    from infra.artifact import Manifest, Provenance, recipe_id
    from infra.store import ArtifactStore

    store = ArtifactStore(tmp_path_factory.mktemp("chat-store") / "store")
    manifest = Manifest(
        **{
            "id": recipe_id("pretrain", 1, {}, {}),
            "kind": "checkpoint",
            "stage": "pretrain",
            "stage_version": 1,
            "config": {},
        },
        **{"inputs": {}, "summary": {}, "provenance": Provenance(), "files": (), "created": datetime.now(UTC)},
    )
    with store.draft(manifest.id) as (out, _):
        shutil.copytree(chat_checkpoint, out, dirs_exist_ok=True)
        store.commit(out, manifest)
    store.tag("arm@latest", manifest.id)
    return store
