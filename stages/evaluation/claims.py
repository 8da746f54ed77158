"""Claims about a line of checkpoints, decided by the data: each says what it needs, and `holds` is computed.

An evaluation is known by the name its config gave it. A claim about an evaluation that is not there does not hold, and
says so: a report must never look better because something was left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from infra.config import Config, Field
from stages.evaluation.intervals import Interval, paired_difference
from stages.evaluation.pass_at_k import curve_ks

Measure = Literal["pass_1", "consensus", "format", "language_consistency", "length"]


class Claim(Config):
    """`left` beats `right` by at least `margin` in `measure`, on the same problems, and the interval excludes zero."""

    left: str = Field(title="Left", description="Name of an evaluation")
    right: str = Field(title="Right", description="Name of another; the same name for a claim between two measures")
    measure: Measure = Field("pass_1", title="Measure")
    right_measure: Measure | None = Field(None, title="Measure on the right", description="None: the same")
    margin: float = Field(0.0, title="Margin", description="Least difference of the means, in the measure's unit")
    strict: bool = Field(True, title="Strict", description="The interval's lower end must lie above zero")

    @property
    def text(self) -> str:
        right = self.right_measure or self.measure
        return f"{self.measure}({self.left}) − {right}({self.right}) ≥ {self.margin:g}"


class Rise(Config):
    """From `before` to `after`, Maj@k rises more than Pass@k: reinforcement learning makes right answers likelier among
    those that the model could already give (DeepSeekMath, section 5.2.2)."""

    after: str = Field(title="After", description="Name of an evaluation")
    before: str = Field(title="Before", description="Name of another, of the checkpoint that training began with")
    k: int = Field(16, ge=2, title="k", description="A point of both curves")

    @property
    def text(self) -> str:
        return f"Maj@{self.k} rises more than Pass@{self.k} from {self.before} to {self.after}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    claim: str
    holds: bool
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    problems: int = 0
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` left: its name, its per-problem records by problem id, its figures, text rows and curves."""

    name: str
    records: Mapping[str, Mapping[str, Any]]
    figures: list[dict[str, Any]]
    text: list[dict[str, Any]]
    curve: list[dict[str, Any]]
    flops: float | None = None  # of the checkpoint's last stage, with the sampling that it learnt from where it says so
    teacher_flops: float = 0.0  # of them what another model spent for it

    @property
    def cost(self) -> str:
        """As a reader of a comparison at equal compute needs it: with and without the teacher."""
        teacher = f" ({self.teacher_flops:.3g} of them a teacher's)" if self.teacher_flops else ""
        return f"{self.flops or 0:.3g}{teacher}"


def judge(claim: Claim, evaluations: Mapping[str, Evaluation]) -> Verdict:
    """Decide `claim` on the problems that both evaluations share."""
    pair = _pair(claim.text, claim.left, claim.right, evaluations)
    if isinstance(pair, Verdict):
        return pair
    left, right, shared = pair
    difference = paired_difference(
        [left.records[problem][claim.measure] for problem in shared],
        [right.records[problem][claim.right_measure or claim.measure] for problem in shared],
        [left.records[problem]["content"] for problem in shared],
    )
    note = f"{left.cost} against {right.cost} FLOPs" if left.flops and right.flops and left is not right else ""
    return Verdict(
        claim.text, _holds(claim, difference), difference.mean, difference.low, difference.high, len(shared), note
    )


def judge_rise(claim: Rise, evaluations: Mapping[str, Evaluation]) -> Verdict:
    """Decide `claim` by the paired difference of the two rises on the problems that both evaluations share."""
    pair = _pair(claim.text, claim.after, claim.before, evaluations)
    if isinstance(pair, Verdict):
        return pair
    after, before, shared = pair

    def rises(measure: str) -> list[float]:
        return [
            _at_k(after.records[problem], measure, claim.k) - _at_k(before.records[problem], measure, claim.k)
            for problem in shared
        ]

    for evaluation in (after, before):
        ks = curve_ks(evaluation.records[shared[0]]["samples"])
        if claim.k not in ks:
            note = f"{evaluation.name} was measured at k = {', '.join(map(str, ks))}"
            return Verdict(claim.text, holds=False, note=note)
    maj, passes = rises("maj_at_k"), rises("pass_at_k")
    difference = paired_difference(maj, passes, [after.records[problem]["content"] for problem in shared])
    note = f"Maj@{claim.k} {sum(maj) / len(maj):+.3f}, Pass@{claim.k} {sum(passes) / len(passes):+.3f}"
    holds = difference.low > 0
    return Verdict(claim.text, holds, difference.mean, difference.low, difference.high, len(shared), note)


def _pair(
    text: str, left: str, right: str, evaluations: Mapping[str, Evaluation]
) -> tuple[Evaluation, Evaluation, list[str]] | Verdict:
    """Both evaluations and the problems that they share, or why a claim about them cannot hold."""
    missing = [name for name in (left, right) if name not in evaluations]
    if missing:
        return Verdict(text, holds=False, note=f"no evaluation named {missing[0]!r}")
    pair = evaluations[left], evaluations[right]
    shared = sorted(pair[0].records.keys() & pair[1].records.keys())
    return (*pair, shared) if shared else Verdict(text, holds=False, note="the evaluations share no problem")


def _at_k(record: Mapping[str, Any], measure: str, k: int) -> float:
    return record[measure][curve_ks(record["samples"]).index(k)]


def _holds(claim: Claim, difference: Interval) -> bool:
    return difference.mean >= claim.margin and (difference.low > 0 or not claim.strict)


def judge_text(evaluation: Evaluation) -> list[Verdict]:
    """One verdict a language: the model needs fewer bits per byte than the byte trigram."""
    verdicts = []
    for row in evaluation.text:
        trigram = row["trigram_bits_per_byte"]
        claim = f"bits per byte({evaluation.name}, {row['language']}) < byte trigram"
        if trigram is None:
            verdicts.append(Verdict(claim, holds=False, note="no training text of that language for the trigram"))
        else:
            difference = trigram - row["bits_per_byte"]
            note = f"{row['bits_per_byte']:.3f} against {trigram:.3f}"
            verdicts.append(Verdict(claim, difference > 0, difference, note=note))
    return verdicts
