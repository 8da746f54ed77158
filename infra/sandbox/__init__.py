"""Sandboxes for code that a model wrote: `code_runner().run(program, stdin, limits)` gives an outcome and why."""

from infra.sandbox.choose import backends, code_runner
from infra.sandbox.runner import CodeRunner, Kind, Limits, Outcome

__all__ = ["CodeRunner", "Kind", "Limits", "Outcome", "backends", "code_runner"]
