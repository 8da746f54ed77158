"""Linux: a fresh interpreter in namespaces, under Landlock, seccomp and rlimits. With or without root, no package.

Two backends share one box (`infra/sandbox/box.py`): `linux` builds the namespaces and the file system itself,
`bubblewrap` has `bwrap` do it, which also works where only a setuid helper may.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
import sys
import sysconfig
import threading
from collections.abc import Sequence
from pathlib import Path

from infra.sandbox import box
from infra.sandbox.probe import probe
from infra.sandbox.runner import Limits, Outcome
from infra.sandbox.watch import judge, watch

# + the thread's id, for a thread runs one program at a time: an identity that owns no file, and whose processes the
# kernel counts for this run alone.
NOBODYS_UID = 1 << 30
FLAGS = ("-I", "-S", "-B", "-X", "utf8")


class LinuxRunner:
    """Namespaces, a root of the interpreter alone, Landlock, seccomp, rlimits."""

    name = "linux"

    def obstacle(self) -> str | None:
        if sys.platform != "linux":
            return f"needs Linux, and this is {sys.platform}: install the extra `sandbox` for the other backends"
        return probe(self)

    def run(self, program: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
        limits = limits or Limits()
        source = program.encode("utf-8", "replace")
        orders = {
            "in_bubblewrap": self.name == "bubblewrap",
            "limits": limits.model_dump(),
            "uid": NOBODYS_UID + threading.get_native_id() if real_root() else None,
            "paths": readable(),
            "hidden": hidden(),
            "python": [interpreter(), *FLAGS],
            "program_bytes": len(source),
            "room": room(limits, source),
        }

        def command(status_fd: int) -> tuple[Sequence[str], bytes]:
            order = json.dumps({**orders, "status_fd": status_fd}).encode()
            feed = order + b"\n" + source + stdin.encode("utf-8", "replace")
            return [*self.launcher(limits, source), interpreter(), *FLAGS, "-c", box_source()], feed

        return judge(watch(command, limits), limits)

    def launcher(self, limits: Limits, source: bytes) -> list[str]:
        """What starts the box: nothing, for the box builds its own walls."""
        return []


class BubblewrapRunner(LinuxRunner):
    """The same box with `bwrap` in front of it."""

    name = "bubblewrap"

    def obstacle(self) -> str | None:
        if sys.platform != "linux" or shutil.which("bwrap") is None:
            return "needs Linux and the program `bwrap`: install your distribution's package `bubblewrap`"
        return probe(self)

    def launcher(self, limits: Limits, source: bytes) -> list[str]:
        argv = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--cap-drop", "ALL"]
        if real_root():  # the box takes another identity, and with it loses these
            argv += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            argv += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
        argv += ["--die-with-parent", "--new-session", "--clearenv", "--hostname", "box"]
        parents = {str(parent) for path in (*readable(), *box.DEVICES) for parent in Path(path).parents}
        for parent in sorted(parents - {"/"}):
            argv += ["--dir", parent]  # those that bwrap makes by itself are closed to the box's identity
        for path in readable():
            argv += ["--ro-bind-try", path, path]
        for path in box.DEVICES:
            argv += ["--dev-bind-try", path, path]
        for path in hidden():
            argv += ["--perms", "0555", "--size", "4096", "--tmpfs", path]
        argv += ["--perms", "1777", "--size", str(room(limits, source)), "--tmpfs", "/tmp"]
        return [*argv, "--remount-ro", "/", "--chdir", "/tmp", "--"]


def real_root() -> bool:
    """Root of the whole machine, who may take any identity; not root of a container that maps it to a user."""
    identity = ["0", "0", str(2**32 - 1)]
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == identity


def room(limits: Limits, source: bytes) -> int:
    """Bytes of the tmpfs: the program's own files, its source, and a page for each of the two to round up."""
    return limits.file_bytes + len(source) + 8192


@functools.cache
def box_source() -> str:
    return inspect.getsource(box)


@functools.cache
def interpreter() -> str:
    """The interpreter below any virtual environment: one whose library is the standard one and nothing of ours."""
    return str(Path(sys.executable).resolve())


@functools.cache
def readable() -> list[str]:
    """All that a program can see of the machine: the interpreter, its standard library, the system's libraries."""
    library = Path(sysconfig.get_config_var("LIBDIR") or "") / (sysconfig.get_config_var("INSTSONAME") or "-")
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    paths = [*system, str(library), sysconfig.get_path("stdlib"), interpreter()]
    return [path for path in paths if Path(path).exists()]


@functools.cache
def hidden() -> list[str]:
    """Folders of installed packages inside what is readable: a program gets none, ours least of all."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    found = [stdlib / "site-packages", stdlib / "dist-packages", Path("/usr/lib/python3/dist-packages")]
    return [str(path) for path in found if path.is_dir()]
