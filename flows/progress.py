"""What a run tells whoever watches it from the same process, such as the command line."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol

from flows.planning import Plan, Step
from infra.artifact import Artifact
from infra.metrics import Progress


class Listener(Protocol):
    """Watches a pipeline (`planned`, `started`, `done`) and the work of its stages (`progress`)."""

    def planned(self, plan: Plan) -> None: ...

    def started(self, step: Step, number: int, total: int) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def done(self, artifact: Artifact, reused: bool, drifted: bool) -> None: ...


LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)
