"""Hostile programs against every sandbox of this machine: none gets out or outstays its limit, each has its reason."""

from __future__ import annotations

import hashlib
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hostile import HOSTILE, Hostile
from legal import LEGAL

from infra.errors import ConfigError
from infra.sandbox import CodeRunner, Limits, Outcome, backends, code_runner, probe
from infra.sandbox.linux import NOBODYS_UID
from infra.sandbox.unsandboxed import Unsandboxed

LIMITS = Limits(wall_seconds=2, cpu_seconds=1, memory_mb=192)
AT_ONCE = 4
HARMLESS = {
    ("wasm", "interpreter's own library"): "its library is a copy in its own memory",
    ("monty", "backtracking in C"): "its regular expressions do not backtrack",
}


@dataclass
class World:
    """What a program could reach if it got out, and what was seen of that afterwards."""

    runner: CodeRunner
    folder: Path
    victim: subprocess.Popen[bytes]
    server: socket.socket
    outcomes: dict[str, Outcome]
    took: dict[str, float]

    def connections(self) -> int:
        """How many reached the server since the last time."""
        for count in range(1000):
            try:
                self.server.accept()[0].close()
            except BlockingIOError:
                return count
        return 1000


@pytest.fixture(scope="module", params=list(backends()))
def runner(request: pytest.FixtureRequest) -> CodeRunner:
    found = backends()[request.param]
    if obstacle := found.obstacle():
        pytest.skip(f"{found.name}: {obstacle}")
    return found


@pytest.fixture(scope="module")
def world(runner: CodeRunner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Runs every hostile program, a few at once, beside a file, a server and a process that must not notice."""
    folder = tmp_path_factory.mktemp("canary")
    secret = secrets.token_hex(8)
    for name in ("canary", "expected"):
        (folder / name).write_text(secret)
        (folder / name).chmod(0o666)
    folder.chmod(0o777)
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with pytest.MonkeyPatch.context() as patch, socket.socket() as server, socket.socket(socket.AF_UNIX) as abstract:
        patch.setenv("FATHOM_CANARY", secret)
        server.bind(("127.0.0.1", 0))
        abstract.bind(f"\0{secret}")
        for listener in (server, abstract):
            listener.listen()
            listener.setblocking(False)
        names = {
            **{"CANARY": str(folder / "canary"), "FOLDER": str(folder), "PORT": str(server.getsockname()[1])},
            **{"VICTIM": str(victim.pid), "SECRET": secret, "REPO": str(Path(__file__).parents[2])},
            "DIGEST": hashlib.sha256(secret.encode()).hexdigest(),
            "PATHS": repr([path for path in sys.path if path]),
        }
        took = {}

        def attack(hostile: Hostile) -> Outcome:
            program = hostile.program
            for name, value in names.items():
                program = program.replace(f"@{name}@", value)
            start = time.monotonic()
            outcome = runner.run(program, limits=LIMITS.replace(**hostile.limits))
            took[hostile.name] = time.monotonic() - start
            return outcome

        with ThreadPoolExecutor(AT_ONCE) as pool:
            outcomes = dict(zip(HOSTILE, pool.map(attack, HOSTILE.values()), strict=True))
        yield World(runner, folder, victim, server, outcomes, took)
    victim.kill()
    victim.wait()


def test_there_are_enough_hostile_programs() -> None:
    assert len(HOSTILE) >= 100


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_ends_as_it_must(world: World, name: str) -> None:
    hostile, outcome = HOSTILE[name], world.outcomes[name]
    assert outcome.kind != "ok" or (world.runner.name, name) in HARMLESS, outcome
    assert outcome.kind != "refused", outcome
    assert outcome.reason
    assert "ESCAPED" not in outcome.stdout + outcome.stderr
    assert (world.folder / "canary").read_text() not in outcome.stdout
    limits = LIMITS.replace(**hostile.limits)
    assert outcome.seconds < limits.wall_seconds + 1
    assert len(outcome.stdout.encode()) <= limits.output_bytes and len(outcome.stderr.encode()) <= limits.output_bytes
    if (world.runner.name, name) == ("bubblewrap", "inodes used up"):  # bwrap bounds bytes alone, so time ends it
        assert outcome.kind in ("error", "timeout"), outcome
    elif world.runner.name in ("linux", "bubblewrap"):  # the others have less to attack, and end differently
        assert (outcome.kind, hostile.reason in outcome.reason) == (hostile.kind, True), outcome


def test_nothing_of_the_parents_was_read_changed_reached_or_killed(world: World) -> None:
    assert sorted(path.name for path in world.folder.iterdir()) == ["canary", "expected"]
    assert (world.folder / "canary").read_text() == (world.folder / "expected").read_text()
    assert world.connections() == 0
    assert world.victim.poll() is None


def test_no_process_is_left(world: World) -> None:
    def left() -> list[str]:
        found = []
        for process in psutil.process_iter(["uids", "cmdline"]):
            line, uids = process.info["cmdline"] or [], process.info["uids"]
            ours = "/tmp/program.py" in line or any("wasm_worker" in word or "The box:" in word for word in line)
            if ours or (uids and uids.real >= NOBODYS_UID):
                found.append(f"{process.pid} {line}")
        return found

    deadline = time.monotonic() + 5  # what a killed box leaves to the kernel
    while left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left() == []


def test_a_parent_that_is_killed_leaves_no_process(runner: CodeRunner) -> None:
    program = "import time\ntime.sleep(9)\ntime.sleep(9)\ntime.sleep(9)"
    told = f"from infra.sandbox import backends as b, Limits; r = b()[{runner.name!r}]; print(r.obstacle(), flush=True)"
    argv = [sys.executable, "-c", f"{told}; r.run({program!r}, limits=Limits(wall_seconds=60))"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout and parent.stdout.readline() == "None\n"
        time.sleep(1.5)
        children = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    assert children
    assert psutil.wait_procs(children, timeout=5)[1] == []


def test_no_program_outstays_its_limit(world: World) -> None:
    slow = {name: s for name, s in world.took.items() if s > 10 + LIMITS.replace(**HOSTILE[name].limits).wall_seconds}
    assert slow == {}


@pytest.mark.parametrize("name", LEGAL)
def test_a_legal_program_works(runner: CodeRunner, name: str) -> None:
    program, stdin, stdout, unable = LEGAL[name]
    outcome = runner.run(program, stdin, Limits(wall_seconds=20, cpu_seconds=20, output_bytes=1 << 16))
    if runner.name in unable.split():
        assert outcome.kind in ("error", "refused"), outcome
    else:
        assert (outcome.kind, outcome.stdout) == ("ok", stdout), outcome


def test_output_is_cut_at_the_limit_and_kept_up_to_it(runner: CodeRunner) -> None:
    outcome = runner.run("for i in range(100): print('0123456789' * 10)", limits=LIMITS.replace(output_bytes=250))
    assert outcome.kind == "output"
    assert outcome.stdout == ("0123456789" * 10 + "\n") * 2 + "0123456789" * 4 + "01234567"


# ---- choosing one


class Leaky(Unsandboxed):
    """A sandbox that holds nothing."""


def test_a_probe_finds_out_a_sandbox_that_holds_nothing() -> None:
    obstacle = probe.probe(Leaky())
    assert obstacle and "escaped" in obstacle
    assert all(what in obstacle for what in ("the network", "a file of ours", "wrote outside", "connected out"))


def test_without_any_sandbox_nothing_runs_unless_told_so_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in backends().values():
        monkeypatch.setattr(type(found), "obstacle", lambda self: "is not here: install it")
    with pytest.raises(ConfigError, match=r"(?s)linux: is not here.*monty: is not here.*unsandboxed_is_fine=True"):
        code_runner()
    with pytest.raises(ConfigError, match="wasm: is not here"):
        code_runner("wasm")
    assert code_runner(unsandboxed_is_fine=True).name == "unsandboxed"
    assert code_runner(unsandboxed_is_fine=True).run("print(input())", "yes").stdout == "yes\n"


def test_the_first_backend_that_works_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in backends().values():
        works = found.name in ("wasm", "monty")
        monkeypatch.setattr(type(found), "obstacle", lambda self, works=works: None if works else "no")
    assert code_runner().name == "wasm"
    assert code_runner("monty").name == "monty"


def test_a_wrong_name_is_answered_with_the_right_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'linux'"):
        code_runner("linx")


def test_an_unsandboxed_program_is_ended_on_time_with_its_children() -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(613)'])"
    assert Unsandboxed().run(program, limits=LIMITS.replace(wall_seconds=1)).kind == "timeout"
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if "import time; time.sleep(613)" in (p.info["cmdline"] or [])
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a sandbox of Linux")
def test_a_box_that_cannot_be_built_refuses_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = backends()["linux"]
    monkeypatch.setattr("infra.sandbox.linux.hidden", lambda: ["/no/such/folder"])
    outcome = runner.run("print('ran')")
    assert (outcome.kind, outcome.stdout) == ("refused", "")
    assert "mount" in outcome.reason


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux")
def test_root_of_a_container_takes_the_way_of_a_plain_user() -> None:
    """In a user namespace we are root, or somebody, without the machine's privileges: the box is built without."""
    told = "from infra.sandbox import backends as b; r = b()['linux']; print(r.obstacle(), r.run('print(1)').kind)"
    for identity in (["--map-root-user"], ["--map-user=1000", "--map-group=1000"]):
        argv = ["unshare", "--user", *identity, sys.executable, "-c", told]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("None ok\n", ""), identity
