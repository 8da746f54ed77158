"""The box: the script that stands between us and a program, and turns one process of its own into the program's prison.

It runs by itself (`python -I -S -B -c <this text>`), with the standard library alone, and reads from its input one line
of JSON (the limits, the paths), then the program, then leaves the rest for the program to read. In order:

1. namespaces: own network (none), processes, mounts, IPC and host name; as a user, a user namespace that allows it
2. a file system made of nothing but the interpreter, read-only, and a small tmpfs at /tmp; the old one is let go
3. a supervisor as process 1, at whose end the kernel kills all others; it tells how the program ended
4. in the program's process: an identity that owns nothing (as root), rlimits, no new privileges, Landlock, seccomp
5. exec of a fresh interpreter on the program, so that nothing of this one is left in its memory

A step that fails ends the box before the program starts: it writes "setup: …" and the parent refuses the program.
Linux >= 5.12 on x86-64 and arm64. Constants are those of the kernel's uapi headers.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import struct
from collections.abc import Callable, Mapping, Sequence

libc = ctypes.CDLL(None, use_errno=True)

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
ANY_NAMESPACE = NEWNS | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET | 0x2000000  # and NEWCGROUP
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, AT_RECURSIVE, AT_FDCWD = 1, 2, 4, 0x8000, -100
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
MAX_THREADS = 32

# Names as in the kernel; numbers for x86-64, then arm64 (None: it has no such call).
DENIED: dict[str, tuple[int, int | None]] = {
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272)},
    **{"pidfd_getfd": (438, 438), "process_madvise": (440, 440), "personality": (135, 92)},
    **{"unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51)},
    **{"pivot_root": (155, 41), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430)},
    **{"fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442)},
    **{"name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265)},
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "syslog": (103, 116)},
    **{"io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
    **{"kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106)},
    # Memory that no rlimit counts.
    **{"memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186)},
}
NEW_PROCESS: dict[str, tuple[int, int | None]] = {"fork": (57, None), "vfork": (58, None)}
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
CLONE_THREAD, AF_UNIX = 0x10000, 1
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH


class SetupError(Exception):
    """A wall that could not be built."""


def must(done: int, what: str) -> int:
    if done < 0:
        raise SetupError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return done


def syscall(number: int, *arguments: int | bytes | None) -> int:
    return libc.syscall(number, *arguments)


# ---- 1 and 2: namespaces and the file system


def enter_namespaces(root: bool) -> None:
    """Leave the host's namespaces; the next fork is process 1 of the new ones. Root needs no new user for it."""
    user, group = os.geteuid(), os.getegid()
    flags = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    must(libc.unshare(flags if root else flags | NEWUSER), "namespaces (unshare)")
    if not root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
            with open(f"/proc/self/{name}", "w") as handle:
                handle.write(text)


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    done = libc.mount(source.encode(), target.encode(), kind and kind.encode(), flags, options.encode())
    must(done, f"mount of {source} on {target}")


def seal(target: str, attributes: int) -> None:
    """Set flags on a mount and all below it, whatever flags they already have."""
    setting = struct.pack("QQQQ", attributes, 0, 0, 0)
    must(syscall(442, AT_FDCWD, target.encode(), AT_RECURSIVE, setting, len(setting)), f"read-only mount of {target}")


def change_root(paths: Sequence[str], hidden: Sequence[str], room: int) -> None:
    """A root of `paths`, read-only, without what is `hidden` in them, and a /tmp of `room` bytes."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in (*paths, *DEVICES) if os.path.exists(path)}
    root = "/tmp"  # the mount point; what it hides is still reached through `sources`
    mount("root", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,mode=755")
    for path, source in sources.items():
        target = root + path
        if os.path.isdir(f"/proc/self/fd/{source}"):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(f"/proc/self/fd/{source}", target, None, MS_BIND | MS_REC)
        seal(target, ATTR_RDONLY | ATTR_NOSUID | (0 if path in DEVICES else ATTR_NODEV))
    for path in hidden:
        mount("hidden", root + path, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4k,mode=555")
    os.makedirs(f"{root}/tmp", exist_ok=True)
    seal(root, ATTR_RDONLY | ATTR_NOSUID)
    mount("tmp", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, f"size={room},nr_inodes=1024,mode=1777")
    os.chdir(root)
    must(syscall({"x86_64": 155, "aarch64": 41}[os.uname().machine], b".", b"."), "pivot_root")
    must(libc.umount2(b".", MNT_DETACH), "letting the old root go")
    os.chdir("/")


# ---- 4: the walls around one process


def set_limits(limits: Mapping[str, int]) -> None:
    """CPU seconds, address space, file sizes, descriptors; threads and processes are counted together by the kernel."""
    cpu, memory, size = limits["cpu_seconds"], limits["memory_mb"] << 20, limits["file_bytes"]
    for what, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, size, size),
        (resource.RLIMIT_NPROC, *(2 * [MAX_THREADS + limits["processes"]])),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
    ):
        resource.setrlimit(what, (soft, hard))
    if limits["processes"] > 1:
        count_of_processes_must_bind()


def count_of_processes_must_bind() -> None:
    """The kernel exempts the machine's root from the count, also where a container calls it by another name."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
    try:
        child = os.fork()
    except BlockingIOError:
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
        return
    if child == 0:
        os._exit(0)
    raise SetupError("the kernel does not count this user's processes: run as another user, or with processes=1")


def restrict_with_landlock(paths: Sequence[str]) -> None:
    """Read and execute `paths`, write to /tmp and /dev/null alone; no TCP; no signal out.

    The second wall of files: a kernel without Landlock has the file system of step 2.
    """
    abi = syscall(444, None, 0, 1)
    if abi < 1:
        return
    everything = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    execute, write_file, read_file, read_dir, truncate = 1, 2, 4, 8, 1 << 14
    devices_and_ioctl = 1 << 6 | 1 << 11 | 1 << 15
    attributes = struct.pack("QQQ", everything, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    ruleset = must(syscall(444, attributes, 8 if abi < 4 else 16 if abi < 6 else 24, 0), "Landlock ruleset")
    of_files = execute | read_file | write_file | truncate
    for path, allowed in (
        *((path, execute | read_file | read_dir) for path in paths),
        *((path, read_file | write_file | truncate) for path in DEVICES),
        ("/tmp", everything & ~(devices_and_ioctl | execute)),
        ("/", read_dir),
    ):
        if os.path.exists(path):
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", allowed & everything & (-1 if os.path.isdir(path) else of_files), beneath)
            must(syscall(445, ruleset, 1, rule, 0), f"Landlock rule for {path}")
            os.close(beneath)
    must(syscall(446, ruleset, 0), "Landlock")
    os.close(ruleset)


def filter_calls(alone: bool) -> None:
    """A seccomp filter: local sockets alone, no namespaces, no reaching into processes; no forks if `alone`."""
    column, audit_arch = ARCHITECTURES[os.uname().machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x50000

    def line(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, k)

    numbers = [n[column] for n in {**DENIED, **(NEW_PROCESS if alone else {})}.values()]
    lines = [line(load, 4), line(equal, audit_arch, 1), line(give, kill), line(load, 0)]
    if column == 0:  # the x32 calls, by which x86-64 has every call twice
        lines += [line(at_least, 0x40000000, 0, 1), line(give, refuse | errno.EPERM)]
    for number in numbers:
        if number is not None:
            lines += [line(equal, number, 0, 1), line(give, refuse | errno.EPERM)]
    lines += [line(equal, CLONE3[column], 0, 1), line(give, refuse | errno.ENOSYS)]  # libc falls back on clone
    clone = [line(load, 16), line(any_bit, ANY_NAMESPACE, 0, 1), line(give, refuse | errno.EPERM)]
    if alone:
        clone += [line(any_bit, CLONE_THREAD, 1), line(give, refuse | errno.EPERM)]
    clone += [line(give, allow)]
    lines += [line(equal, CLONE[column], 0, len(clone)), *clone]
    socket = [line(load, 16), line(equal, AF_UNIX, 1), line(give, refuse | errno.EACCES), line(give, allow)]
    lines += [line(equal, SOCKET[column], 0, len(socket)), *socket, line(give, allow)]
    code = ctypes.create_string_buffer(b"".join(lines))
    must(libc.prctl(PR_SET_SECCOMP, 2, struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code)), 0, 0), "seccomp")


def confine(limits: Mapping[str, int], paths: Sequence[str], uid: int | None) -> None:
    """All the walls around the calling process, `uid` the identity to take (None: the namespace has given one)."""
    os.chdir("/tmp")
    os.umask(0o077)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    set_limits(limits)
    must(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    restrict_with_landlock(paths)
    filter_calls(alone=limits["processes"] == 1)


# ---- 3 and 5: the processes


def supervise(start: Callable[[], None], tell: Callable[[str], None]) -> None:
    """Fork, `start` in the child, and tell how it ended; orphans of a process 1 are reaped on the way."""
    child = os.fork()
    if child == 0:
        try:
            os.setsid()  # a program that signals its group signals itself
            start()
        except (SetupError, OSError, ValueError) as error:
            tell(f"setup: {error}")
        finally:
            os._exit(1)
    while True:
        ended, status, used = os.wait3(0)
        if ended == child:
            signalled = os.WIFSIGNALED(status)
            how = f"signal {os.WTERMSIG(status)}" if signalled else f"exit {os.WEXITSTATUS(status)}"
            tell(f"{how} cpu {used.ru_utime + used.ru_stime:.2f}")
            os._exit(0)


def die_with_parent() -> None:
    must(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "death with the parent")


def main() -> None:
    header = bytearray()
    while not header.endswith(b"\n"):
        header += os.read(0, 1)
    order = json.loads(header)
    program = bytearray()
    while len(program) < order["program_bytes"]:
        program += os.read(0, order["program_bytes"] - len(program))
    status: int = order["status_fd"]
    os.set_inheritable(status, False)

    def tell(line: str) -> None:
        os.write(status, f"{line}\n".encode())

    def start() -> None:
        with open("/tmp/program.py", "wb") as handle:
            handle.write(program)
        os.chmod("/tmp/program.py", 0o444)
        confine(order["limits"], order["paths"], order["uid"])
        tell("ready")
        os.execve(order["python"][0], [*order["python"], "/tmp/program.py"], {})

    try:
        die_with_parent()
        if order["in_bubblewrap"]:
            supervise(start, tell)
        enter_namespaces(root=order["uid"] is not None)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        init = os.fork()
        if init == 0:
            die_with_parent()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            change_root(order["paths"], order["hidden"], order["room"])
            supervise(start, tell)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(init, signal.SIGKILL))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        # Returns when all of the namespace is dead. Not reaped, for a late signal must not find its id reused.
        os.waitid(os.P_PID, init, os.WEXITED | os.WNOWAIT)
        os._exit(0)
    except (SetupError, OSError, ValueError) as error:
        tell(f"setup: {error}")
        os._exit(1)


if __name__ == "__main__":
    main()
