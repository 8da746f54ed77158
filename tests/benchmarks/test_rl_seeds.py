"""The parts of the benchmark over seeds that need no training: its graphs, its mixed chains, its means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.rl.seeds import MIXED, PARTS, PROCESS, halves, mixed_conversations, over_seeds, plot, widened
from flows.pipelines import LINE
from flows.recipes import load_recipe
from stages.rl.rewards import language_consistency, parse

HAN = re.compile("[一-鿿]")


def test_the_graphs_of_all_parts_fit_the_recipe(tmp_path: Path) -> None:
    recipe = widened(load_recipe("tiny"), tmp_path)
    assert {pipeline.name for _, pipeline in PARTS.values()} == {LINE.name, MIXED.name, PROCESS.name}
    for pipeline in (MIXED, PROCESS):
        pipeline.check()
    steps: Any = recipe.resolve(PROCESS)
    forms = {name: (steps[name].supervision, steps[name].step_credit) for name in ("progress_rl", "sum_rl")}
    assert forms == {"progress_rl": ("process", "progress"), "sum_rl": ("process", "sum")}
    differing = {"name", "supervision", "step_credit"}
    outcome, *others = (steps[name].model_dump(exclude=differing) for name in ("reasoning_rl", *forms))
    assert others == [outcome, outcome]
    configs = recipe.resolve(MIXED)
    assert configs["plain_rl"].rewards.language == 0  # type: ignore[attr-defined]
    assert configs["language_rl"].rewards.language == 1  # type: ignore[attr-defined]
    same = {"name", "rewards"}
    plain, other = (configs[name].model_dump(exclude=same) for name in ("plain_rl", "language_rl"))
    assert plain == other


def test_a_quarter_of_the_chains_changes_its_language_and_a_quarter_is_in_the_other() -> None:
    rows = mixed_conversations(load_recipe("tiny"), 600)
    shares = []
    for row in rows:
        question, reply = (message["content"] for message in row["messages"])
        parsed = parse(reply)
        assert parsed is not None
        shares.append(language_consistency(parsed.chain, "zh" if HAN.search(question) else "en"))
    assert len({row["messages"][0]["content"] for row in rows}) == 600
    assert sum(share == 1 for share in shares) / 600 == pytest.approx(0.5, abs=0.12)  # a short chain has no middle
    assert sum(share == 0 for share in shares) / 600 == pytest.approx(0.25, abs=0.12)
    assert sum(0 < share < 1 for share in shares) > 60


def test_halves_change_at_a_comma() -> None:
    assert halves("first 1+2=3, then 3+4=7", "先算1+2=3，再算3+4=7") == "first 1+2=3,再算3+4=7"


def test_means_over_seeds_have_their_t_interval(tmp_path: Path) -> None:
    rows = [
        {"case": "a", "metric": f"seed {n}", "ours": value, "anchors": {}} for n, value in enumerate((0.1, 0.2, 0.3))
    ]
    *_, mean = over_seeds(rows)
    assert (mean["metric"], mean["ours"]) == ("mean of 3 seeds", pytest.approx(0.2))
    assert mean["anchors"]["low_95_over_seeds"] == pytest.approx(0.2 - 4.303 * 0.1 / 3**0.5)
    plot(tmp_path / "a.png", over_seeds(rows))
    assert (tmp_path / "a.png").stat().st_size > 1000
