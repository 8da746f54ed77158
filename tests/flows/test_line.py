"""The real line at its smallest, by the real command: killed in every stage, finished, and run again in parts.

All tests share one store. The first leaves it finished; any other run by itself has it finished first, without kills.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.pipelines import LINE
from infra.metrics import METRICS, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# Every stage works for real, and just long enough to be caught at it. Sums of two or three digits have few answers, so
# that a model of seconds of training, once it has learnt the format, has some right replies to sample from.
FAMILY = {"families": ["chain_sum"], "levels": [1]}
REPLY = {"max_new_tokens": 32}
GRPO = {"steps": 4, "rollout_groups": 4, "groups_per_step": 8, "group_size": 4, "save_every": 1, **REPLY}
SAMPLE = {"problems.limit": 200, "samples": 3, **REPLY}
STUDENT = {"steps": 60, "batch_size": 8, "validation_every": 30, "validation_windows": 2}
SMALL: dict[str, dict[str, Any]] = {
    "ingest": {"max_bytes": 200_000},
    "ingest_math": {"source.n": 2_000, **{f"source.{name}": value for name, value in FAMILY.items()}},
    "filter": {"quality_documents": 150},
    "train_tokenizer": {"vocab_size": 1024},
    "generate_problems": {"n_train": 1_000, "n_heldout": 48, **FAMILY},
    "pretrain": {
        **{"steps": 150, "batch_size": 8, "validation_every": 75, "validation_windows": 2},
        **{"model.d_model": 64, "model.n_layers": 2, "model.d_ff": 128},
    },
    "extend_context": {
        **{"validation_windows": 2, "needle.lengths": [128, 256], "needle.depths": 2, "needle.cases": 1},
        "phases": [
            {"sequence_length": length, "rope_factor": 2.0, "steps": 4, "batch_size": 2} for length in (192, 256)
        ],
    },
    "evaluate": {"samples": 2, "validation_windows": 2, "trigram_bytes": 50_000, **REPLY},
    "sample_zero": {"problems.limit": 300, "samples": 6, **REPLY},
    "cold_start": {"epochs": 20, "learning_rate.peak": 2e-3},
    "general": {"max_conversations": 100},
    "sample": SAMPLE,
    "sft": {"epochs": 20, "learning_rate.peak": 2e-3},
    "sample_teacher": SAMPLE,
    "grpo": GRPO,
    "student_base_llama": STUDENT,
    "student_base_qwen": STUDENT,
}
SETTINGS = [
    f"--set={node}.{field}={json.dumps(value)}" for node, fields in SMALL.items() for field, value in fields.items()
]

# Where each stage is killed, in the line's order: a node, and what shows that it works: its draft is there ("draft"),
# its workers have reported ("progress"), or that many steps are on record (beyond the first state that can be resumed).
KILLED: dict[str, str | int] = {
    "ingest_python_docs": "draft",
    "deduplicate": "draft",
    "filter": "draft",
    "mix": "draft",
    "train_tokenizer": "draft",
    "tokenize": "draft",
    "generate_problems": "draft",
    "pretrain": 55,
    "extend_context": 2,
    "evaluate_base": "progress",
    "r1_zero": 2,
    "cold_start": 2,
    "sample": "progress",
    "rejection_sample": "draft",
    "distill_llama": 2,
    "report": "draft",
}
RESUMED = ("pretrain", "r1_zero")
ORDER = [node.name for node in LINE.nodes]
WORK_SECONDS = 600  # until a node works
DEATH_SECONDS = 60  # until Ray's workers have noticed that their driver is gone


class Line:
    """The line on a store of its own, by processes that share nothing else with this machine's."""

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.folder, self.store = folder, folder / "store"
        own = {"FATHOM_STORE": str(self.store), "RAY_TMPDIR": str(temporary)}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "PYTEST_"))}
        self.environment = {**inherited, **own}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.logs: list[Path] = []

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """`fathom run line` as the leader of a session of its own; its output goes to the newest of `logs`."""
        self.logs.append(self.folder / f"run-{len(self.logs):02d}.log")
        command = [sys.executable, "-m", "flows.cli", "run", "line", *SETTINGS, *arguments]
        with self.logs[-1].open("wb") as log:
            process = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        self.processes.append(process)
        return process

    def run(self, *arguments: str) -> tuple[list[str], list[str]]:
        """A run to its end: (nodes made, nodes reused)."""
        process = self.start(*arguments)
        assert process.wait(900) == 0, self.output
        return self.nodes("made"), self.nodes("reused")

    def kill(self, node: str, sign: str | int) -> None:
        """Start a run, SIGKILL its process group as soon as `node` shows the sign of working, see all of it die."""
        process = self.start()
        wait_for(lambda: process.poll() is not None or self._works(node, sign), WORK_SECONDS, self.logs[-1])
        assert process.poll() is None, f"it ended before {node} was seen working:\n{self.output}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_for(lambda: not members(process.pid), DEATH_SECONDS, f"of {node}: {members(process.pid)}")

    def _works(self, node: str, sign: str | int) -> bool:
        name = self.ids[node].replace("/", "-")
        if not any((self.store / "drafts").glob(f"{name}-*")):
            return False
        if isinstance(sign, int):
            return len(read_metrics(self.store / "scratch" / name / METRICS)) >= sign
        return sign == "draft" or f" {node}: " in self.output

    @property
    def output(self) -> str:
        return self.logs[-1].read_text()

    def nodes(self, how: str) -> list[str]:
        """Nodes that the newest run says it has made or reused, in order."""
        return re.findall(rf"^\[\d+/\d+\] (\w+): {how}", self.output, re.MULTILINE)

    def ask(self, *arguments: str) -> Any:
        """What a command prints as JSON."""
        result = CliRunner().invoke(app, [*arguments, "--json"], env={"FATHOM_STORE": str(self.store)})
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def plan(self, *settings: str) -> dict[str, dict[str, Any]]:
        """Steps by node."""
        return {step["node"]: step for step in self.ask("plan", "line", *SETTINGS, *settings)}

    def created(self) -> dict[str, str]:
        """Id → time of creation of every artifact in the listing."""
        return {row["id"]: row["created"] for row in self.ask("artifacts", "list")}

    @cached_property
    def ids(self) -> dict[str, str]:
        """Node → the id that it makes."""
        return {node: step["id"] for node, step in self.plan().items()}

    def finish(self) -> None:
        """See to it that the line is there."""
        if set(self.created()) != set(self.ids.values()):
            self.run()

    def end(self) -> None:
        """End what a failed test left running."""
        for process in self.processes:
            for member in members(process.pid):
                with suppress(psutil.NoSuchProcess):
                    member.kill()


def members(session: int) -> list[psutil.Process]:
    """Living processes of a session: Ray's workers have process groups of their own, and stay in their driver's."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_for(happened: Callable[[], bool], seconds: float, what: object) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"waited {seconds} s; {what}"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    temporary = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's sockets lie in it
    made = Line(tmp_path_factory.mktemp("line"), temporary)
    yield made
    made.end()
    shutil.rmtree(temporary, ignore_errors=True)


def test_killed_in_every_stage_the_line_keeps_what_is_finished_and_goes_on(line: Line) -> None:
    assert {LINE.by_name[node].stage for node in KILLED} == {node.stage for node in LINE.nodes}
    kept: dict[str, str] = {}
    killed: dict[str, float] = {}
    for node, sign in KILLED.items():
        line.kill(node, sign)
        killed[node] = time.time()
        finished = ORDER[: ORDER.index(node)]
        created = line.created()
        assert set(created) == {line.ids[name] for name in finished}, line.output
        assert kept.items() <= created.items()
        assert line.nodes("reused") == [name for name in finished if line.ids[name] in kept]
        assert line.ask("artifacts", "verify") == {"verified": len(finished), "faults": []}
        kept = created

    assert line.run() == (["report"], ORDER[:-1])
    assert set(line.created()) == set(line.ids.values())
    assert kept.items() <= line.created().items()
    assert line.ask("artifacts", "verify") == {"verified": len(ORDER), "faults": []}
    for node in RESUMED:
        steps = read_metrics(line.store / "artifacts" / line.ids[node] / METRICS)
        first = steps[0]["step"]  # 0 where the stage validates before it trains
        assert first in (0, 1)
        assert [row["step"] for row in steps] == list(range(first, first + len(steps)))
        assert steps[0]["time"] < killed[node] < steps[-1]["time"]
    assert len(list((line.store / "drafts").iterdir())) == len(KILLED)
    assert line.ask("artifacts", "gc", "--yes") == {"deleted": True, "artifacts": []}
    assert list((line.store / "drafts").iterdir()) == []


def test_a_second_run_reuses_everything(line: Line) -> None:
    line.finish()
    before = line.ask("artifacts", "list")
    assert line.run() == ([], ORDER)
    assert line.ask("artifacts", "list") == before


@pytest.mark.parametrize(
    ("options", "executed", "reused"),
    [
        (["--only", "mix"], ["mix"], []),
        (["--from", "rejection_sample", "--until", "sft"], ["rejection_sample", "sft"], []),
        (["--force", "generate_problems"], ["generate_problems"], [n for n in ORDER if n != "generate_problems"]),
    ],
)
def test_a_part_that_is_asked_for_is_executed_again_and_nothing_else(
    line: Line, options: list[str], executed: list[str], reused: list[str]
) -> None:
    line.finish()
    before = line.created()
    assert line.run(*options) == (executed, reused)
    after = line.created()
    assert set(after) == set(before)
    assert {id for id in after if after[id] != before[id]} == {line.ids[node] for node in executed}
    # The same recipe gives the same bytes: what was made from the old ones is still what its manifest says.
    assert line.ask("artifacts", "verify") == {"verified": len(ORDER), "faults": []}


@pytest.mark.parametrize(
    ("node", "setting"),
    [
        ("ingest_math", "--set=ingest_math.seed=1"),
        ("mix", "--set=mix.max_epochs=1.5"),
        ("generate_problems", "--set=generate_problems.seed=1"),
        ("cold_start", "--set=cold_start.learning_rate.peak=1e-4"),
        ("student_base_qwen", "--set=student_base_qwen.steps=61"),
        ("report", "--set=report.title=other"),
    ],
)
def test_a_changed_setting_gives_new_ids_from_there_on_and_nowhere_else(line: Line, node: str, setting: str) -> None:
    line.finish()
    planned = line.plan(setting)
    changed = {name for name, step in planned.items() if step["id"] != line.ids[name]}
    assert changed == LINE.downstream(node)
    assert {name for name, step in planned.items() if step["state"] == "run"} == changed
    assert {step["state"] for step in planned.values()} <= {"run", "reuse"}


def test_the_distilled_students_lineage_has_a_path_to_every_ingest(line: Line) -> None:
    line.finish()
    graph = line.ask("artifacts", "lineage", "distill_llama@latest")
    ingests = {node["id"] for node in graph["nodes"] if node["stage"] == "ingest"}
    assert ingests == {line.ids[name] for name in ORDER if LINE.by_name[name].stage == "ingest"}
    parents: dict[str, set[str]] = {}
    for edge in graph["edges"]:
        parents.setdefault(edge["to"], set()).add(edge["from"])
    reached: set[str] = set()
    waiting = [line.ids["distill_llama"]]
    while waiting:
        id = waiting.pop()
        reached.add(id)
        waiting += parents.get(id, ())
    assert ingests <= reached
