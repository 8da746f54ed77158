"""The named figures of a report about one checkpoint: what a gate tests and a model card lists.

`report.json` of the stages evaluate, probe and benchmark has them under `measures`, beside `checkpoint`, the id of the
artifact that was measured, and `kind`, which names what was done.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from infra.artifact import Artifact
from infra.errors import InputError
from stages.evaluation.intervals import Interval

REPORT = "report.json"


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure with its 95 % interval; a figure that is no mean over cases (bits per byte) has none."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, interval: Interval) -> Measure:
        return cls(interval.mean, interval.low, interval.high)

    @classmethod
    def named(cls, row: Mapping[str, float], name: str) -> Measure:
        """From a row with the columns `name`, `name_low` and `name_high`."""
        return cls(row[name], row[f"{name}_low"], row[f"{name}_high"])

    def __str__(self) -> str:
        return f"{self.value:.3f}" if self.low is None else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def to_json(measures: Mapping[str, Measure]) -> dict[str, Any]:
    return {name: dataclasses.asdict(measure) for name, measure in measures.items()}


def read_report(artifact: Artifact, checkpoint: Artifact) -> dict[str, Any]:
    """report.json of an artifact, `measures` as Measure; InputError unless it speaks about `checkpoint`."""
    path = artifact.path / REPORT
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "measures" not in content:
        raise InputError(f"{artifact.id} has no measures: give reports of the stages evaluate, probe or benchmark")
    if content["checkpoint"] != checkpoint.id:
        raise InputError(f"{artifact.id} is about {content['checkpoint']}, not {checkpoint.id}: leave it out")
    return content | {"measures": {name: Measure(**value) for name, value in content["measures"].items()}}


def joined(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Measure]:
    """The measures of several reports, by artifact id; InputError for a name that two of them have."""
    measures: dict[str, Measure] = {}
    for artifact_id, report in reports.items():
        if twice := sorted(report["measures"].keys() & measures.keys()):
            raise InputError(f"{artifact_id} has {twice[0]}, which another report has too: leave one of them out")
        measures |= report["measures"]
    return measures
