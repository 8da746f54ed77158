"""A child process watched from outside: fed, read up to a limit, stopped on time, and judged."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from infra.sandbox.runner import Kind, Limits, Outcome

CHUNK = 1 << 16
SETUP_SECONDS = 60.0  # until a sandbox says that the program starts, on a loaded machine
GRACE_SECONDS = 5.0  # between asking a sandbox to end and killing it


@dataclasses.dataclass
class Ended:
    """What was seen of a child. `status`: the lines that its supervisor wrote to a pipe which the program never had."""

    stdout: bytearray
    stderr: bytearray
    status: bytearray
    stopped: str = ""
    seconds: float = 0.0


def watch(
    command: Callable[[int], tuple[Sequence[str], bytes]], limits: Limits, environment: Mapping[str, str] | None = None
) -> Ended:
    """Run a child to its end or a limit; nothing of it is left. `command(status_fd)` gives its argv and its stdin.

    The clock starts when the status pipe says "ready".
    """
    status_read, status_write = os.pipe()
    argv, feed = command(status_write)
    try:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(status_write,),
            env=dict(environment or {}),
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )
    except BaseException:
        os.close(status_read)
        raise
    finally:
        os.close(status_write)
    ended = Ended(bytearray(), bytearray(), bytearray())
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as ready:
        stack.enter_context(child)
        stack.callback(_end, child)
        stack.callback(os.close, status_read)
        assert child.stdin and child.stdout and child.stderr
        os.set_blocking(child.stdin.fileno(), False)
        sinks = {child.stdout.fileno(): ended.stdout, child.stderr.fileno(): ended.stderr, status_read: ended.status}
        for fd in sinks:
            ready.register(fd, selectors.EVENT_READ)
        ready.register(child.stdin, selectors.EVENT_WRITE)
        start, deadline = time.monotonic(), time.monotonic() + SETUP_SECONDS
        left, silent = memoryview(feed), 0
        while silent < len(sinks) and not ended.stopped:
            for key, _ in ready.select(max(0.0, deadline - time.monotonic())):
                if key.fileobj is child.stdin:
                    left = _write(child, left, ready)
                    continue
                data, sink = os.read(key.fd, CHUNK), sinks[key.fd]
                if not data:
                    ready.unregister(key.fd)
                    silent += 1
                elif key.fd == status_read:
                    waiting = b"ready\n" not in sink
                    sink += data[:CHUNK]
                    if waiting and b"ready\n" in sink:
                        start = time.monotonic()
                        deadline = start + limits.wall_seconds
                else:
                    sink += data[: limits.output_bytes + 1 - len(sink)]
                    if len(sink) > limits.output_bytes:
                        del sink[limits.output_bytes :]
                        ended.stopped = "output"
            if time.monotonic() >= deadline and not ended.stopped:
                ended.stopped = "timeout"
        ended.seconds = time.monotonic() - start
    return ended


def _write(child: subprocess.Popen[bytes], left: memoryview, ready: selectors.BaseSelector) -> memoryview:
    """Feed what the pipe takes; close it at the end, or when nobody reads any more."""
    assert child.stdin
    try:
        left = left[os.write(child.stdin.fileno(), left[:CHUNK]) :]
    except BlockingIOError:
        return left
    except BrokenPipeError:
        left = left[:0]
    if not left:
        ready.unregister(child.stdin)
        child.stdin.close()
    return left


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask first: a box that is asked waits until every process in it is dead."""
    child.send_signal(signal.SIGTERM)  # nothing, if the child has been waited for
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def judge(ended: Ended, limits: Limits) -> Outcome:
    """The outcome of a watched run, from what its supervisor told."""
    stdout, stderr = (bytes(text).decode("utf-8", "replace") for text in (ended.stdout, ended.stderr))
    lines = ended.status.decode("utf-8", "replace").splitlines()
    last = next((line for line in reversed(stderr.splitlines()) if line.strip()), "").strip()[:300]

    def outcome(kind: Kind, reason: str) -> Outcome:
        return Outcome(kind, reason, stdout, stderr, round(ended.seconds, 4))

    failure = next((line for line in lines if line.startswith("setup: ")), None)
    if failure is not None or "ready" not in lines:
        why = failure.removeprefix("setup: ") if failure else last or "it ended, or stalled, without a word"
        return outcome("refused", f"the sandbox could not be built: {why}")
    if ended.stopped == "output":
        return outcome("output", f"wrote more than {limits.output_bytes} bytes")
    if ended.stopped == "timeout":
        return outcome("timeout", f"still ran after {limits.wall_seconds:g} s")
    how, number, cpu = "signal", signal.SIGKILL.value, 0.0
    for line in lines:
        match line.split():
            case [("exit" | "signal") as how, told, "cpu", used]:
                number, cpu = int(told), float(used)
    if how == "signal":
        if number == signal.SIGXCPU or (number == signal.SIGKILL and cpu >= limits.cpu_seconds):
            return outcome("timeout", f"used up its {limits.cpu_seconds} s of CPU")
        return outcome("error", f"killed by {_name(number)}")
    if number == 0:
        return outcome("ok", "ended by itself")
    if last == "MemoryError" or last.startswith("MemoryError:"):
        return outcome("memory", f"asked for more than {limits.memory_mb} MB")
    return outcome("error", last or f"exit status {number}")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
