"""The reproductions plan from any published checkpoint, and run scaled down by the real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from flows.pipelines import PIPELINES
from flows.planning import Selection, plan
from flows.recipes import REPRODUCTIONS, load_recipe
from infra.store import ArtifactStore
from stages.evaluate import EvaluateConfig
from stages.grpo import GrpoConfig
from stages.problems.problem import Problem
from stages.problems.registry import FAMILIES, make
from stages.rl.prompts import prompt_ids
from stages.rl.rewards import TAGS, score
from stages.rl.rollout import read_rollouts
from stages.tokens.bpe import load_tokenizer

QUESTIONS = [(f"Pull {n}.", str(n)) for n in range(10)]
EVALUATE = {"samples": 2, "max_new_tokens": 16, "problems.limit": 8}
GRPO = {
    "precision": "fp32",
    "steps": 2,
    "groups_per_step": 4,
    "rollout_groups": 2,
    "group_size": 2,
    "max_new_tokens": 16,
}
SMALL: dict[str, dict[str, object]] = {
    "logic_rl": {"puzzles.n_train": 40, "puzzles.n_heldout": 10, "puzzles.levels": [2]},
    "tiny_zero": {"puzzles.n_train": 40, "puzzles.n_heldout": 10},
    "open_r1": {"trace_sft.sequence_length": 64, "trace_sft.batch_size": 2, "trace_sft.precision": "fp32"},
}


@pytest.fixture(scope="module")
def published(taught: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A micro checkpoint in DeepSeek's published form, with room for the longest of the puzzles' questions."""
    from model.exchange import export_hf
    from stages.training.checkpoint import load_model

    base = taught(tmp_path_factory.mktemp("base"), QUESTIONS, steps=1, max_position=1024)
    folder = tmp_path_factory.mktemp("published")
    export_hf(load_model(base), folder, base)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces in Open-R1's form and maths problems, as files."""
    folder = tmp_path_factory.mktemp("sources")
    traces = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"<think>so</think>{a}"}]}
        for q, a in QUESTIONS
    ]
    problems = [{"problem": f"What is {n}+{n}?", "solution": str(2 * n)} for n in range(200)]
    for name, rows in (("traces", traces), ("math", problems)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def settings(name: str, published: Path, sources: Path) -> list[str]:
    values: dict[str, object] = {"import_base.path": str(published), **SMALL[name]}
    if name == "open_r1":
        about = {"kind": "files", "name": "traces", "format": "jsonl", "license": "MIT"}
        values["traces.source"] = {**about, "path": str(sources / "traces.jsonl")}
        values["math.path"] = str(sources / "math.jsonl")
    for node in PIPELINES[load_recipe(name).pipeline or ""].nodes:
        more = {"evaluate": EVALUATE, "grpo": GRPO}.get(node.stage, {})
        values |= {f"{node.name}.{field}": value for field, value in more.items()}
    return [f"{field}={json.dumps(value)}" for field, value in values.items()]


@pytest.mark.parametrize("name", REPRODUCTIONS)
def test_a_reproduction_plans_every_node_from_a_published_checkpoint(
    name: str, published: Path, sources: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(name)
    pipeline = PIPELINES[recipe.pipeline or ""]
    made = plan(pipeline, recipe, ArtifactStore(tmp_path), settings(name, published, sources), Selection())
    assert [step.node.name for step in made.steps] == list(pipeline.by_name)
    assert {step.state for step in made.steps} == {"run"}
    assert made.problem is None


# What a right reply earns; the recipe whose form is not said in the prompt has learnt it from traces.
PAID = {"logic_rl": 3.0, "tiny_zero": 1.0, "open_r1": 1.1}


@pytest.mark.parametrize("name", REPRODUCTIONS)
def test_a_reproduction_says_the_form_of_a_reply_and_pays_it_in_full(
    name: str, published: Path, sources: Path, tmp_path: Path
) -> None:
    recipe, tokenizer = load_recipe(name), load_tokenizer(published)
    made = plan(
        PIPELINES[recipe.pipeline or ""],
        recipe,
        ArtifactStore(tmp_path),
        settings(name, published, sources),
        Selection(),
    )
    configs = {step.node.name: step.config for step in made.steps}
    if name == "open_r1":
        assert configs["traces"].model_dump()["traces"] == "think_answer"
        problem = Problem("m", "math", "en", 1, "?", "so", "1/2", "boxed", {"value": "1/2"}, "m")
    else:
        family = FAMILIES[configs["puzzles"].model_dump()["families"][0]]
        problem = make(family, "en", 2, Random(0))
    for config in configs.values():
        if isinstance(config, GrpoConfig | EvaluateConfig):
            ids = prompt_ids(problem.question, config.template, tokenizer, (), config.system_prompt)
            said = tokenizer.decode(ids, skip_special=False)
            assert problem.question in said
            assert name == "open_r1" or all(tag in said for tag in TAGS)
    (rewards,) = (config.rewards for config in configs.values() if isinstance(config, GrpoConfig))
    for space in ("", " ", "\n"):
        parts = ("<think>", problem.chain, "</think>", "<answer>", problem.answer, "</answer>")
        assert score(problem, space.join(parts), True, rewards).reward == pytest.approx(PAID[name])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", REPRODUCTIONS)
def test_a_scaled_down_reproduction_runs_to_its_report(
    name: str, published: Path, sources: Path, tmp_path: Path
) -> None:
    pytest.importorskip("math_verify")
    arguments = [f"--set={one}" for one in settings(name, published, sources)]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "PYTEST_"))}
    environment = {**inherited, "FATHOM_STORE": str(tmp_path / "store")}
    pipeline = load_recipe(name).pipeline or ""
    command = [sys.executable, "-m", "flows.cli", "run", pipeline, "--recipe", name, *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    store = ArtifactStore(tmp_path / "store")
    report = store.check("report_traces@latest" if name == "open_r1" else "report_zero@latest")
    content = json.loads((report.path / "report.json").read_text(encoding="utf-8"))
    assert len(content["checkpoints"]) == 2
    assert len(content["claims"]) == 1
    rl = store.check("math_rl@latest" if name == "open_r1" else "puzzle_rl@latest")
    assert rl.summary["steps"] == 2
    tokenizer = load_tokenizer(rl.path)
    asked = [tokenizer.decode(row["prompt_ids"], skip_special=False) for row in read_rollouts(rl.path)]
    assert asked
    assert name == "open_r1" or all(tag in prompt for prompt in asked for tag in TAGS)
