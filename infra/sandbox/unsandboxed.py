"""No sandbox: the program runs as you, in a process of its own, ended on time and with its output cut."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

from infra.sandbox.runner import Limits, Outcome
from infra.sandbox.watch import judge, watch

WRAPPER = """\
import os, signal, subprocess, sys
status, path = int(sys.argv[1]), sys.argv[2]
os.set_inheritable(status, False)
signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
child = subprocess.Popen([sys.executable, "-I", "-S", "-B", "-X", "utf8", path])
os.write(status, b"ready\\n")
code = child.wait()
os.write(status, f"{'exit' if code >= 0 else 'signal'} {abs(code)} cpu 0\\n".encode())
"""


class Unsandboxed:
    """Runs anything, with everything that you can reach. Only `code_runner(unsandboxed_is_fine=True)` makes one."""

    name = "unsandboxed"

    def obstacle(self) -> str | None:
        return None

    def run(self, program: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
        limits = limits or Limits()
        with tempfile.NamedTemporaryFile(suffix=".py") as file:
            file.write(program.encode("utf-8", "replace"))
            file.flush()

            def command(status_fd: int) -> tuple[Sequence[str], bytes]:
                argv = [sys.executable, "-I", "-S", "-B", "-c", WRAPPER, str(status_fd), file.name]
                return argv, stdin.encode("utf-8", "replace")

            return judge(watch(command, limits), limits)
