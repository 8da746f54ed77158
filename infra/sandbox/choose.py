"""Which sandbox: the strongest that works on this machine, or none and an error that says what to install."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from infra.config import nearest
from infra.errors import ConfigError
from infra.sandbox.linux import BubblewrapRunner, LinuxRunner
from infra.sandbox.monty import MontyRunner
from infra.sandbox.runner import CodeRunner
from infra.sandbox.unsandboxed import Unsandboxed
from infra.sandbox.wasm import WasmRunner


@functools.cache
def backends() -> Mapping[str, CodeRunner]:
    """Every way to hold a program, strongest first. The last has the smallest language."""
    runners: list[CodeRunner] = [LinuxRunner(), BubblewrapRunner(), WasmRunner(), MontyRunner()]
    return {runner.name: runner for runner in runners}


def code_runner(name: str = "auto", unsandboxed_is_fine: bool = False) -> CodeRunner:
    """The backend of that name, or for "auto" the first that works. Each proves itself by a probe the first time.

    Where none works this raises a ConfigError; with `unsandboxed_is_fine` it returns one that runs programs as you.
    """
    known = backends()
    if name != "auto" and name not in known:
        raise ConfigError(f"sandbox: no backend {name!r}; {nearest(name, ['auto', *known])}")
    obstacles = {}
    for runner in known.values() if name == "auto" else [known[name]]:
        obstacles[runner.name] = runner.obstacle()
        if obstacles[runner.name] is None:
            return runner
    if unsandboxed_is_fine:
        return Unsandboxed()
    reasons = "\n".join(f"  {backend}: {obstacle}" for backend, obstacle in obstacles.items())
    raise ConfigError(
        f"sandbox: nothing here can hold a program that a model wrote, and Fathom runs none unheld:\n{reasons}\n"
        "Mend one of these, or say code_runner(unsandboxed_is_fine=True) if you trust every program as yourself."
    )
