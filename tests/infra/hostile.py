"""Programs that want out, each with how it must end on Linux: `### name | kind | part of the reason | limits`.

A program that finds its attack stopped raises; one that is not stopped ends well, which no test accepts. Names in
capitals between @s are filled in by the test: a file, a folder, a port, a process, a secret of the parent's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Hostile:
    name: str
    kind: str
    reason: str
    limits: Mapping[str, int]
    program: str


def _parse(table: str) -> dict[str, Hostile]:
    found = {}
    for head, program in re.findall(r"^### (.*)\n((?:(?!### ).*\n)*)", table, re.MULTILINE):
        name, kind, reason, *rest = (part.strip() for part in head.split("|"))
        limits = {key: int(value) for key, value in (item.split("=") for item in " ".join(rest).split())}
        assert name not in found
        found[name] = Hostile(name, kind, reason, limits, program)
    return found


HOSTILE = _parse(r"""
### fork bomb | error | PermissionError
import os
while True: os.fork()
### fork bomb where four processes are allowed | timeout | still ran | processes=4
import os
while True:
    try: os.fork()
    except OSError: pass
### fork bomb without waiting | error | BlockingIOError | processes=4
import os
while True:
    if os.fork() == 0: os._exit(0)
### daemon that outlives its parent | error | left a daemon | processes=4
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        time.sleep(600)
    os._exit(0)
raise SystemExit("left a daemon")
### daemon that keeps the output open | error | left a daemon | processes=4
import os, time
if os.fork() == 0:
    os.setsid(); time.sleep(600)
raise SystemExit("left a daemon")
### subprocess | error | PermissionError
import subprocess
subprocess.run(["/bin/sh", "-c", "id"], check=True)
### shell | error | status
import os
raise SystemExit(f"status {os.system('id')}")
### popen | error | Error
import os
os.popen("id").read()
### posix spawn | error | Error
import os
os.posix_spawn("/bin/sh", ["sh"], {})
### multiprocessing | error | PermissionError
import multiprocessing
multiprocessing.get_context("fork").Process(target=print).start()
### thread bomb | error | start new thread
import threading, time
threading.stack_size(65536)
while True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
### exec of a shell | error | FileNotFoundError
import os
os.execv("/bin/sh", ["sh", "-c", "id"])
### vfork from C | error | refused
import ctypes
if ctypes.CDLL(None).vfork() < 0: raise SystemExit("refused")
### clone from C | error | refused
import ctypes, os
clone = 56 if os.uname().machine == "x86_64" else 220
if ctypes.CDLL(None).syscall(clone, 17, 0, 0, 0, 0) < 0: raise SystemExit("refused")
### clone3 from C | error | refused
import ctypes
if ctypes.CDLL(None).syscall(435, bytes(88), 88) < 0: raise SystemExit("refused")
### memory bomb, a list | memory | MB | wall_seconds=6 cpu_seconds=5
x = []
while True: x.append(bytearray(1000000))
### memory bomb, one piece | memory | MB
x = bytearray(10**11)
### memory bomb, doubling | memory | MB | wall_seconds=6 cpu_seconds=5
x = "ab"
while True: x += x
### memory bomb that carries on | timeout | s
x = []
while True:
    try: x.append(bytearray(1000000))
    except MemoryError: pass
### memory mapping | error | OSError
import mmap
mmap.mmap(-1, 10**11)
### memory in a file descriptor | error | PermissionError
import os
os.memfd_create("x")
### memory in System V segments | error | refused
import ctypes
if ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) < 0: raise SystemExit("refused")
### memory limit raised | error | ValueError
import resource
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
### disk filled by one file | error | OSError
with open("/tmp/big", "wb") as f:
    while True: f.write(bytes(65536))
### disk filled by many files | error | OSError
for n in range(10**6): open(f"/tmp/{n}", "wb").write(bytes(50000))
### inodes used up | error | OSError
for n in range(10**6): open(f"/tmp/{n}", "wb").close()
### descriptors used up | error | OSError
x = []
while True: x.append(open("/dev/null"))
### crash in C | error | SIGSEGV
import ctypes
ctypes.string_at(0)
### abort | error | SIGABRT
import os
os.abort()
### stack overflow in C | error | SIGSEGV | wall_seconds=6 cpu_seconds=5
import sys
sys.setrecursionlimit(10**9)
class A:
    def __repr__(self): return repr(self)
repr(A())
### endless loop | timeout | s
while True: pass
### sleep | timeout | still ran
import time
while True: time.sleep(100)
### loop that ignores every signal | timeout | s
import signal
for n in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(n, signal.SIG_IGN)
while True: pass
### sleep that ignores every signal | timeout | still ran
import signal, time
for n in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(n, signal.SIG_IGN)
while True: time.sleep(100)
### loop that catches everything | timeout | s
while True:
    try:
        while True: pass
    except BaseException: pass
### long sum in C | timeout | s
sum(range(10**13))
### long power in C | timeout | s
len(str(7 ** (7 ** 10)))
### long digest in C | timeout | s
import hashlib
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
### endless iterator in C | timeout | s
import collections, itertools
collections.deque(itertools.repeat(0), maxlen=0)
### backtracking in C | timeout | s
import re
re.match("(a+)+$", "a" * 64 + "b")
### wait in C without an end | timeout | still ran
import select
select.select([], [], [])
### deadlock | timeout | still ran
import threading
lock = threading.Lock(); lock.acquire(); lock.acquire()
### stop itself | timeout | still ran
import os, signal
os.kill(os.getpid(), signal.SIGSTOP)
### loop after the end | timeout | s
import atexit
@atexit.register
def late():
    while True: pass
### threads that do not end | timeout | s
import threading
def spin():
    while True: pass
for _ in range(8): threading.Thread(target=spin).start()
### endless output | output | bytes
while True: print("x" * 1000)
### endless errors | output | bytes
import sys
while True: print("x" * 1000, file=sys.stderr)
### endless output without a line's end | output | bytes
import os
while True: os.write(1, b"x")
### one long output | output | bytes
print("x" * 10**7)
### silence and a closed output | timeout | still ran
import os, time
for fd in range(3): os.close(fd)
time.sleep(100)
### forged end through inherited descriptors | error | none open
import os
for fd in range(3, 1024):
    try: os.write(fd, b"exit 0 cpu 0\n"); print("ESCAPED", fd)
    except OSError: pass
raise SystemExit("none open")
### read a file of the parent's | error | FileNotFoundError
print(open("@CANARY@").read())
### write a file of the parent's | error | FileNotFoundError
open("@CANARY@", "w").write("changed")
### write beside a file of the parent's | error | FileNotFoundError
open("@FOLDER@/new", "w").write("new")
### delete a file of the parent's | error | FileNotFoundError
import os
os.remove("@CANARY@")
### replace a file of the parent's | error | Error
import os
open("/tmp/x", "w").write("changed"); os.rename("/tmp/x", "@CANARY@")
### reward file | error | FileNotFoundError
open("@FOLDER@/reward.json", "w").write('{"reward": 1}')
### expected output in a file | error | FileNotFoundError
print(open("@FOLDER@/expected").read())
### symbolic link to a file of the parent's | error | FileNotFoundError
import os
os.symlink("@CANARY@", "/tmp/link"); open("/tmp/link", "a").write("changed")
### symbolic link in place of the working folder | error | Error
import os
os.rmdir("/tmp"); os.symlink("@FOLDER@", "/tmp")
### hard link to a file of the parent's | error | FileNotFoundError
import os
os.link("@CANARY@", "/tmp/link")
### way up out of the folder | error | FileNotFoundError
open("../" * 20 + "@CANARY@").read()
### way up through a descriptor | error | FileNotFoundError
import os
root = os.open("/", os.O_RDONLY)
for _ in range(20): root = os.open("..", os.O_RDONLY, dir_fd=root)
os.open("@CANARY@".lstrip("/"), os.O_RDONLY, dir_fd=root)
### users of the machine | error | FileNotFoundError
print(open("/etc/passwd").read())
### home folders | error | FileNotFoundError
import os
print(os.listdir("/home"))
### interpreter's own library | error | Error
import os
open(os.__file__, "a").write("x")
### file at the root | error | Error
open("/x", "w")
### device | error | PermissionError
import os, stat
os.mknod("/tmp/disk", stat.S_IFBLK | 0o600, os.makedev(8, 0))
### executable of its own | error | PermissionError
import os
open("/tmp/x", "w").write("#!/bin/true\n"); os.chmod("/tmp/x", 0o755); os.execv("/tmp/x", ["x"])
### mount | error | refused
import ctypes
if ctypes.CDLL(None).mount(b"none", b"/tmp", b"tmpfs", 0, 0) < 0: raise SystemExit("refused")
### lifting of a mount | error | refused
import ctypes
if ctypes.CDLL(None).umount2(b"/tmp", 2) < 0: raise SystemExit("refused")
### namespace of its own | error | refused
import ctypes
if ctypes.CDLL(None).unshare(0x10000000) < 0: raise SystemExit("refused")
### another root | error | PermissionError
import os
os.chroot("/tmp")
### processes listed | error | FileNotFoundError
import os
print([n for n in os.listdir("/proc") if n.isdigit()])
### environment of process 1 | error | FileNotFoundError
print(open("/proc/1/environ", "rb").read())
### memory of the parent through /proc | error | FileNotFoundError
open("/proc/@VICTIM@/mem", "rb").read(1)
### descriptors of the parent through /proc | error | FileNotFoundError
import os
print(os.listdir("/proc/@VICTIM@/fd"))
### kernel's settings | error | FileNotFoundError
open("/proc/sys/kernel/core_pattern", "w").write("|/tmp/x")
### trace of another process | error | refused
import ctypes
if ctypes.CDLL(None).ptrace(16, @VICTIM@, 0, 0) < 0: raise SystemExit("refused")
### memory of the supervisor | error | refused
import ctypes, os
space = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 8)
if ctypes.CDLL(None).process_vm_readv(os.getppid(), space, 1, space, 1, 0) < 0: raise SystemExit("refused")
### kill of a process of the parent's | error | Error
import os
os.kill(@VICTIM@, 9)
### kill of the supervisor | error | still here
import os
try: os.kill(os.getppid(), 9)
finally: raise SystemExit("still here")
### kill of everything | error | Error
import os
os.kill(-1, 9); raise OSError("Error")
### kill of its group | error | SIGKILL
import os
os.killpg(0, 9)
### limits of the supervisor | error | tried
import os, resource
try: resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))
except OSError: pass
raise SystemExit("tried")
### root again | error | Error
import os
os.setuid(0)
### real-time priority | error | PermissionError
import os
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
### connection to the parent | error | PermissionError
import socket
socket.create_connection(("127.0.0.1", @PORT@), timeout=1).send(b"out")
### datagram to the parent | error | PermissionError
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"out", ("127.0.0.1", @PORT@))
### connection by IPv6 | error | PermissionError
import socket
socket.socket(socket.AF_INET6).connect(("::1", @PORT@))
### raw packets | error | PermissionError
import socket
socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
### listening | error | PermissionError
import socket
socket.create_server(("127.0.0.1", 0))
### name of a host | error | gaierror
import socket
socket.getaddrinfo("example.com", 80)
### page of the web | error | Error
import urllib.request
urllib.request.urlopen("http://127.0.0.1:@PORT@/", timeout=1)
### connection from asyncio | error | PermissionError
import asyncio
asyncio.run(asyncio.open_connection("127.0.0.1", @PORT@))
### socket to the hypervisor | error | PermissionError
import socket
socket.socket(40, socket.SOCK_STREAM).connect((2, 1))
### kernel's sockets | error | PermissionError
import socket
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
### abstract socket of the parent | error | Error
import socket
socket.socket(socket.AF_UNIX).connect("\0@SECRET@")
### io_uring | error | refused
import ctypes
if ctypes.CDLL(None).syscall(425, 8, bytes(120)) < 0: raise SystemExit("refused")
### keys of the kernel | error | refused
import ctypes, os
if ctypes.CDLL(None).syscall({"x86_64": 250}.get(os.uname().machine, 219), 0, -3, 0) < 0: raise SystemExit("refused")
### our own code | error | ModuleNotFoundError
import infra.sandbox
### our own code by its path | error | ModuleNotFoundError
import sys
sys.path.append("@REPO@")
import stages.problems.verify
### packages of the environment | error | ModuleNotFoundError
import sys
sys.path += @PATHS@
import pydantic
### environment of the parent | error | KeyError
import os
print(os.environ["FATHOM_CANARY"])
### expected answer in its own memory | error | not found
import gc, hashlib, os, sys
texts = [*sys.argv, *sys.orig_argv, *os.environ, *os.environ.values()]
for x in gc.get_objects():
    if isinstance(x, dict): texts += [*x.keys(), *x.values()]
    elif isinstance(x, (list, tuple, set)): texts += x
digests = {hashlib.sha256(text.encode()).hexdigest() for text in texts if isinstance(text, str)}
raise SystemExit("ESCAPED" if "@DIGEST@" in digests else "not found")
### error that looks like success | error | exit status 3
import os
print("exit 0 cpu 0"); os._exit(3)
### source that is no source | error | SyntaxError
]]]
### endless source | error | Error
x = ((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((
""")
