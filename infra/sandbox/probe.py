"""Before a sandbox is trusted it is attacked: a program tries to get out, and we look from outside whether it did."""

from __future__ import annotations

import contextlib
import functools
import socket
import tempfile
from pathlib import Path

from infra.sandbox.runner import CodeRunner, Limits

ATTACK = """
got = []
try:
    import socket
    socket.create_connection(("127.0.0.1", {port}), timeout=1).send(b"out")
    got.append("the network")
except Exception:
    pass
try:
    with open({canary!r}) as handle:
        handle.read()
    got.append("a file of ours")
except Exception:
    pass
try:
    with open({canary!r}, "w") as handle:
        handle.write("changed")
except Exception:
    pass
try:
    with open("/proc/1/environ") as handle:
        handle.read()
    got.append("the environment of another process")
except Exception:
    pass
print("reached", got)
"""


@functools.cache
def probe(runner: CodeRunner) -> str | None:
    """Why the sandbox cannot be trusted on this machine, or None. It must run a program and hold it."""
    with tempfile.TemporaryDirectory(prefix="fathom-canary-") as folder, socket.socket() as server:
        canary = Path(folder) / "canary"
        canary.write_text("alive")
        Path(folder).chmod(0o777)  # only the sandbox may stand between the program and these
        canary.chmod(0o666)
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)
        attack = ATTACK.format(port=server.getsockname()[1], canary=str(canary))
        outcome = runner.run(attack, limits=Limits(wall_seconds=20, cpu_seconds=20))
        if outcome.kind != "ok":
            return f"a probe could not run: {outcome.reason}"
        escaped = [] if outcome.stdout.strip() == "reached []" else [outcome.stdout.strip()]
        if canary.read_text() != "alive" or [path.name for path in Path(folder).iterdir()] != ["canary"]:
            escaped.append("wrote outside")
        with contextlib.suppress(BlockingIOError):
            server.accept()[0].close()
            escaped.append("connected out")
    return f"a probe escaped ({'; '.join(escaped)})" if escaped else None
