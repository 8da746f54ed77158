"""The stage on a ladder of seconds: what it leaves, and that a killed one trains only what is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.artifact import Artifact
from infra.errors import ConfigError
from infra.metrics import read_metrics
from infra.ray import shutdown
from infra.stage import Context
from stages.scaling_laws import ScalingLawsConfig, scaling_laws
from stages.tokens.bpe import train
from stages.tokens.shards import ShardWriter, write_index

CONFIG = {
    "model": {"family": "llama", "d_model": 32, "n_layers": 2, "n_heads": 8, "d_ff": 88, "init_std": 0.1},
    "sequence_length": 16,
    "batch_size": 4,
    "learning_rate": {"schedule": "multi_step_v1", "peak": 1e-2, "warmup_steps": 2},
    "hyper": {
        "budgets": [{"compute": 3e7, "scale": 1.4e4}, {"compute": 6e7, "scale": 1.4e4}],
        "peak_factors": [1.0, 1e30],
        "batch_factors": [1.0],
    },
    "budgets": [{"compute": compute, "scales": [6e3, 1.4e4, 2.3e4, 3.5e4]} for compute in (4.5e7, 6.5e7, 9e7)],
    "held_out": 1.5e8,
    "validation_windows": 2,
}
POINTS = 4 + 12 + 1
PROGRAM = """
import json, sys
from pathlib import Path
from infra.artifact import Artifact
from infra.stage import Context
from stages.scaling_laws import ScalingLawsConfig, scaling_laws

config, tokens, folder = sys.argv[1:]
scaling_laws(
    ScalingLawsConfig.parse(json.loads(config)),
    {"tokens": Artifact.local(Path(tokens), "tokens")},
    Context.local(Path(folder)),
)
"""


@pytest.fixture(scope="module", autouse=True)
def end_ray():
    yield
    shutdown()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("tokens")
    texts = [" ".join(f"{a} times {b} is {a * b}." for b in range(2, 12)) for a in range(2, 90)]
    tokenizer = train(texts, 300)
    tokenizer.save(folder)
    writer = ShardWriter(folder, 0, tokenizer.vocab_size)
    for n, text in enumerate(texts):
        names = {"id": f"t/{n}", "language": ("en", "zh")[n % 2], "domain": "test", "source": "test"}
        ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
        writer.add(ids, "validation" if n % 9 == 0 else "train", bytes=len(text.encode()), **names)
    write_index(folder, [writer.close()], tokenizer.vocab_size)
    return Artifact.local(folder, "tokens")


def start(tokens: Artifact, folder: Path) -> subprocess.Popen:
    words = [sys.executable, "-c", PROGRAM, json.dumps(CONFIG), str(tokens.path), str(folder)]
    return subprocess.Popen(words, cwd=Path(__file__).parents[2], env=os.environ, start_new_session=True)


@pytest.mark.slow
def test_a_killed_stage_trains_only_what_is_missing_and_leaves_a_whole_report(tokens, tmp_path):
    process = start(tokens, tmp_path)
    points = tmp_path / "scratch" / "points"
    deadline = time.monotonic() + 240
    while len(list(points.glob("*.json"))) < 7:
        assert process.poll() is None, "the stage ended before it could be killed"
        assert time.monotonic() < deadline, "the stage hangs"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "out").iterdir())
    finished = {path.name: path.stat().st_mtime_ns for path in points.glob("*.json")}
    assert 7 <= len(finished) < POINTS

    ctx = Context.local(tmp_path, workers=2)
    seen = []
    ctx._log.on_progress = seen.append
    summary = scaling_laws(ScalingLawsConfig.parse(CONFIG), {"tokens": tokens}, ctx)
    assert {name: (points / name).stat().st_mtime_ns for name in finished} == finished, "a finished point ran again"
    assert list(points.glob("*.json")) and len(list(points.iterdir())) == POINTS, "resume states were left behind"

    assert next(iter(summary)) == "held_out_relative_error"
    assert summary["points"] == POINTS
    assert abs(summary["held_out_relative_error"]) < 0.5
    assert summary["scale_exponent"] + summary["tokens_exponent"] == pytest.approx(1, abs=2e-4)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["held_out"]["run"]["bits_per_byte"] == pytest.approx(summary["held_out_measured"], abs=1e-4)
    assert "not the paper's data" in (tmp_path / "out" / "report.md").read_text()
    for name in ("isoflop", "optima", "hyper", "held_out"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    rows = [json.loads(line) for line in (tmp_path / "out" / "points.jsonl").read_text().splitlines()]
    assert [row["part"] for row in rows].count("ladder") == 12
    for row in rows:
        assert row["scale"] * row["tokens"] == pytest.approx(row["compute"], rel=0.5 / row["steps"])
        assert (row["bits_per_byte"] is None) == (row["peak"] > 1), "the rate of 1e28 diverges, and only that"
    assert rows[-1]["part"] == "held_out"
    assert rows[-1]["compute"] == CONFIG["held_out"]

    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert seen[-1].done == seen[-1].total
    assert seen[-1].unit == "GFLOPs"
    assert max(row.get("points", 0) for row in read_metrics(tmp_path / "scratch" / "metrics.jsonl")) == POINTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held_out": 8e7}, r"held_out \(8e\+07\) lie beyond the last"),
        ({"budgets": CONFIG["budgets"][::-1]}, "budgets must grow"),
        ({"budgets": CONFIG["budgets"][:2]}, "at least 3 items"),
        ({"hyper": {"budgets": CONFIG["hyper"]["budgets"][:1]}}, "at least 2 items"),
        ({"hyper": {"budgets": CONFIG["hyper"]["budgets"][:1] * 2}}, "give every grid another one"),
    ],
)
def test_a_ladder_that_cannot_be_climbed_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ScalingLawsConfig.parse(CONFIG | change)


def test_scales_that_give_the_same_shape_are_refused_before_anything_is_trained(tokens, tmp_path):
    narrow = [{**budget, "scales": [1.4e4, 1.41e4, 2.3e4, 3.5e4]} for budget in CONFIG["budgets"]]
    with pytest.raises(ConfigError, match=r"budget 4.5e\+07: 4 scales give 3 different shapes"):
        scaling_laws(ScalingLawsConfig.parse(CONFIG | {"budgets": narrow}), {"tokens": tokens}, Context.local(tmp_path))
