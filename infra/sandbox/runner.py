"""What a sandbox is asked and what it answers. Code that a model wrote runs through a `CodeRunner` alone.

An outcome is an answer, not an exception: whatever a program does, it ends in one, with the reason in plain words.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

from infra.config import Config, Field

Kind = Literal["ok", "error", "timeout", "memory", "output", "refused"]


class Limits(Config):
    """What one run may use. Part of a config's identity: a program that is right in 5 seconds may not be in 1."""

    wall_seconds: float = Field(5.0, gt=0, le=600, description="time from the program's start, whatever it waits for")
    cpu_seconds: int = Field(5, ge=1, le=600, description="CPU time of each process")
    memory_mb: int = Field(256, ge=64, le=65536, description="address space of each process")
    processes: int = Field(1, ge=1, le=32, description="processes at once; 1 forbids a program to start any")
    output_bytes: int = Field(1 << 16, ge=0, le=1 << 26, description="bytes of stdout, and again of stderr")
    file_bytes: int = Field(1 << 20, ge=0, le=1 << 30, description="bytes of all files that the program writes")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended. `refused`: it never ran. stdout and stderr: what it wrote, cut at the limit."""

    kind: Kind
    reason: str
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0


class CodeRunner(Protocol):
    """One way to run programs. Safe to share between threads."""

    name: str

    def run(self, program: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
        """Run Python source to its end or its limits (None: the defaults). Never raises for what a program does."""
        ...

    def obstacle(self) -> str | None:
        """What is missing for this way to work on this machine and what to do about it; None: nothing is."""
        ...
