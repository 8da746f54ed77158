"""The form in which every benchmark keeps its results: read by `tables.py` and by people."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from infra import provenance


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
