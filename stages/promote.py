"""A gate before a name: a checkpoint earns a tag such as r1@released only if its reports say that it is good enough.

A requirement holds for the *bound* of an interval: `pass_1 >= 0.5` asks that the low end of pass@1 reaches 0.5, and
`chain_mixed <= 0.1` that the high end of the share of mixed chains stays below 0.1. A figure without an interval stands
for itself. The verdict is an artifact, refused or not; the flow of this stage sets the tag (flows/promotion.py).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from infra.config import Config, Field, nearest
from infra.errors import InputError
from infra.stage import Context, Inputs, many, stage
from stages.evaluation.measures import REPORT, Measure, joined, read_report

REQUIREMENT = re.compile(r"(?P<measure>\S+)\s*(?P<sign><=|>=)\s*(?P<threshold>-?\d+(?:\.\d*)?(?:[eE]-?\d+)?)")


class PromoteConfig(Config):
    tag: str = Field(pattern=r"^[\w.-]+@[\w.-]+$", title="Tag", description="What is earned, such as r1@released")
    require: tuple[str, ...] = Field(
        min_length=1, title="Requirements", description='Each "measure >= threshold" or "measure <= threshold"'
    )

    @model_validator(mode="after")
    def _written_right(self) -> Self:
        for text in self.require:
            if not REQUIREMENT.fullmatch(text.strip()):
                raise ValueError(f'require: {text!r}: write it as "pass_1 >= 0.5" or "chain_mixed <= 0.1"')
        return self


@dataclasses.dataclass(frozen=True)
class Finding:
    """A requirement with the figure that decides it."""

    requirement: str
    measure: Measure
    bound: float
    holds: bool

    def __str__(self) -> str:
        return f"{self.requirement} {'holds' if self.holds else 'fails'}: {self.bound:.4g} of {self.measure}"


@stage(version=1, takes={"checkpoint": "checkpoint", "reports": many("report")}, makes="report")
def promote(config: PromoteConfig, inputs: Inputs, ctx: Context) -> dict:
    """Decide from a checkpoint's reports whether it earns a tag."""
    checkpoint = inputs["checkpoint"]
    measures = joined({report.id: read_report(report, checkpoint) for report in inputs["reports"]})
    findings = [decide(text.strip(), measures) for text in config.require]
    failed = [str(finding) for finding in findings if not finding.holds]
    report = {
        "checkpoint": checkpoint.id,
        "tag": config.tag,
        "promoted": not failed,
        "requirements": [dataclasses.asdict(finding) for finding in findings],
    }
    (ctx.out / REPORT).write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    (ctx.out / "report.md").write_text(markdown(report, findings), encoding="utf-8")
    return {
        "promoted": not failed,
        "tag": config.tag,
        "checkpoint": checkpoint.id,
        "requirements": len(findings),
        "failed": "; ".join(failed),
    }


def decide(requirement: str, measures: Mapping[str, Measure]) -> Finding:
    """Hold the bound that counts against the threshold; InputError for a measure that no report has."""
    match = REQUIREMENT.fullmatch(requirement)
    assert match, requirement
    measure = measures.get(match["measure"])
    if measure is None:
        raise InputError(f"require: no report has {match['measure']!r}; {nearest(match['measure'], measures)}")
    at_least, threshold = match["sign"] == ">=", float(match["threshold"])
    end = measure.low if at_least else measure.high
    bound = measure.value if end is None else end
    return Finding(requirement, measure, bound, bound >= threshold if at_least else bound <= threshold)


def markdown(report: Mapping[str, Any], findings: list[Finding]) -> str:
    lines = [
        f"# {report['tag']}: {'promoted' if report['promoted'] else 'refused'}",
        "",
        f"`{report['checkpoint']}`. A requirement is held against the end of the 95 % interval that makes it harder.",
        "",
        "| requirement | figure | bound | holds |",
        "|-|-|-|-|",
    ]
    lines += [f"| {f.requirement} | {f.measure} | {f.bound:.4g} | {'yes' if f.holds else 'no'} |" for f in findings]
    return "\n".join(lines) + "\n"
