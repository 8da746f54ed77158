"""The toy line through a real Prefect server and a real Ray, in processes of their own: killed, resumed, reused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from infra.store import ArtifactStore

Start = Callable[..., "subprocess.Popen[str]"]
SLOW = ("run", "toy", "--recipe", "toy", "--set", "cubes.seconds=2")


def wait_for(process: subprocess.Popen[str], pattern: str) -> str:
    """Read lines until one matches; all that was read."""
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if re.search(pattern, line):
            return seen
    raise AssertionError(f"{pattern!r} never came:\n{seen}")


def ended(process: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str]:
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def test_a_killed_run_leaves_nothing_half_made_and_the_next_goes_on(fathom: Start, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    killed = fathom(*SLOW)
    wait_for(killed, r"cubes: \d+/12 numbers")
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert [i.partition("/")[0] for i in store.ids()] == ["count", "count", "square"]
    os.killpg(killed.pid, signal.SIGKILL)  # Prefect's temporary server outlives a killed client
    left_by_the_kill = {path.name for path in (store.work / "drafts").iterdir()}
    assert len(left_by_the_kill) == 1

    interrupted = fathom(*SLOW)
    seen = wait_for(interrupted, r"cubes: \d+/12 numbers")
    assert len(re.findall("reused", seen)) == 3
    interrupted.send_signal(signal.SIGINT)
    code, output = ended(interrupted)
    assert code == 130, output
    assert "Traceback" not in output
    assert len(store.ids()) == 3
    assert {path.name for path in (store.work / "drafts").iterdir()} == left_by_the_kill

    code, output = ended(fathom("run", "toy", "--recipe", "toy", script="toy_inspect.py"))
    assert code == 0, output
    assert len(store.ids()) == 5
    sums = store.get("sums@latest")
    assert sums.summary == {"total": 4370, "parts": 2}
    assert sums.manifest.provenance.labels["recipe"] == "toy"
    assert "total 4370" in output

    found = json.loads(output.partition("INSPECTED")[2])
    names = {(flow, run, name) for flow, run, _, name in found["runs"]}
    assert {("count", "small", "Reused"), ("square", "squares", "Reused"), ("square", "cubes", "Completed")} <= names
    assert "Completed" in {name for flow, _, _, name in found["runs"] if flow == "toy-pipeline"}
    pages = {key: data for kind, key, data in found["artifacts"] if kind == "markdown"}
    cubes = pages[store.get("cubes@latest").id.replace("/", "-")]
    assert "```mermaid" in cubes
    assert "data:image/png" in cubes
    assert "pipeline-toy" in pages
    assert ("progress", "cubes-progress") in {(kind, key) for kind, key, _ in found["artifacts"]}
