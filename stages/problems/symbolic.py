"""Are two formulas equal? Asked of math-verify in a process of its own, which dies when it takes too long.

math-verify's own time-outs are signals, which fail outside the main thread (and so in Ray's workers), and a signal
handler does not run inside one long operation on integers: `9^{9^{9^9}}` must be killed from without. The process is
reused between calls, for it takes a second to start and a call about a millisecond.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

from infra.errors import ConfigError

LIMIT = 3.0  # seconds for one comparison
START_LIMIT = 120.0  # seconds for the process to import its libraries
WORKER = Path(__file__).with_name("symbolic_worker.py")


class Comparer:
    """One worker process, started when it is needed. Safe to share between threads: they take turns."""

    def __init__(self, limit: float = LIMIT) -> None:
        self.limit = limit
        self._turn = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equivalent(self, gold: str, said: str) -> bool:
        """What math-verify says within the limit; False when it cannot say, breaks or is too slow."""
        with self._turn:
            process = self._process or self._start()
            return self._exchange(process, json.dumps([gold, said]) + "\n", self.limit) == "1\n"

    def close(self) -> None:
        with self._turn:
            self._end()

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join(folder for folder in sys.path if folder)
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(self.limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},  # it finds what this process finds
        )
        if self._exchange(self._process, "", START_LIMIT) != "ready\n":
            raise ConfigError("math-verify does not start; pip install --force-reinstall 'fathom-line[math]'")
        return self._process

    def _exchange(self, process: subprocess.Popen[str], line: str, limit: float) -> str:
        """Write a line and read one. "" from a process that broke or was killed at the limit, and is then forgotten."""
        assert process.stdin and process.stdout
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(limit, expire)
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        finally:
            timer.cancel()
            timer.join()  # from here on it has either fired or never will
        if expired.is_set() or not reply:
            self._end()
            return ""
        return reply

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe
                with contextlib.suppress(BrokenPipeError):  # the unsent rest of a line
                    pipe.close()
            self._process = None


def equivalent(gold: str, said: str) -> bool:
    """Whether two LaTeX formulas say the same, by this process's own worker."""
    return _comparer(os.getpid()).equivalent(gold, said)


@cache
def _comparer(pid: int) -> Comparer:
    """One a process: a fork must not write into its parent's pipes."""
    return Comparer()
