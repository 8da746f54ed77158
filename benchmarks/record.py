"""The form in which every benchmark keeps its results: read by `tables.py` and by people."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from infra import provenance


def command(program: str, arguments: Sequence[str] | None = None) -> str:
    """What repeats a run with these arguments (None: this process's), without where its results went and `--commit`."""
    kept: list[str] = []
    given = iter(sys.argv[1:] if arguments is None else arguments)
    for argument in given:
        if argument in ("--out", "--commit"):
            next(given, None)
        elif not argument.startswith(("--out=", "--commit=")):
            kept.append(argument)
    return shlex.join(["python", program, *kept])


def write(path: Path, command: str, rows: Iterable[dict[str, Any]], commit: str | None = None, **more: Any) -> None:
    """`rows` of {case, metric, ours, anchors}, with the device, the versions and the commit that they came from.

    `commit` is for a tree that is no checkout; `more` is kept beside the rows.
    """
    found, dirty = provenance.git_state()
    result = {
        "device": provenance.device_name(),
        "versions": provenance.package_versions(),
        "commit": commit or found,
        **({} if commit else {"dirty": dirty}),
        "date": datetime.date.today().isoformat(),
        "command": command,
        **more,
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(path)
