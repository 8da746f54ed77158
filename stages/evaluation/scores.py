"""From sampled rows to one record a problem, and from records to figures with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pyarrow as pa

from stages.evaluation.intervals import Interval, bootstrap_mean, bootstrap_share
from stages.evaluation.pass_at_k import curve_ks, maj_at_k, pass_at_k
from stages.problems.problem import Problem
from stages.problems.verify import ballot
from stages.rl.rewards import answer_of

PROBLEM_SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("family", pa.string()),
        ("language", pa.string()),
        ("level", pa.int32()),
        ("content", pa.string()),
    ]
    + [("samples", pa.int32())]
    + [(name, pa.float64()) for name in ("pass_1", "pass_k", "consensus", "format", "language_consistency", "length")]
    + [(name, pa.list_(pa.float64())) for name in ("pass_at_k", "maj_at_k")]  # at `curve_ks(samples)`
)
MEASURES = ("pass_1", "pass_k", "consensus", "format", "language_consistency", "length")


def problem_record(problem: Problem, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the n samples of one problem say. pass_1 is their mean correctness, pass_k that any of them is right, and
    consensus that of their majority: the ends of the two curves."""
    n, ks = len(rows), curve_ks(len(rows))
    correct = sum(row["accuracy"] >= 1 for row in rows)
    answers = [answer_of(problem, row["completion"]) for row in rows]
    votes = [None if answer is None else ballot(problem, answer) for answer in answers]
    # Replies that share a vote are judged alike but where a ballot merges what a verifier tells apart.
    cast, right = Counter(votes), Counter(vote for vote, row in zip(votes, rows, strict=True) if row["accuracy"] >= 1)
    passes = [pass_at_k(n, correct, k) for k in ks]
    majorities = maj_at_k(votes, lambda vote: Fraction(right[vote], cast[vote]), ks)
    return {
        "problem_id": problem.id,
        "family": problem.family,
        "language": problem.language,
        "level": problem.level,
        "content": problem.content,
        "samples": n,
        "pass_1": passes[0],
        "pass_k": passes[-1],
        "consensus": majorities[-1],
        "format": sum(row["format"] for row in rows) / n,
        "language_consistency": sum(row["language_consistency"] for row in rows) / n,
        "length": sum(row["tokens"] for row in rows) / n,
        "pass_at_k": passes,
        "maj_at_k": majorities,
    }


def curve(records: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """One row a k: pass@k and maj@k over all problems, each with its 95 % interval."""
    contents = [record["content"] for record in records]
    rows = []
    for position, k in enumerate(curve_ks(records[0]["samples"])):
        row: dict[str, Any] = {"k": k}
        for name in ("pass", "maj"):
            values = [record[f"{name}_at_k"][position] for record in records]
            row |= _named(name, bootstrap_share(values, contents, seed))
        rows.append(row)
    return rows


def table(records: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """One row for everything, each language, each family and each pair: means with 95 % intervals over problems."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        for family in ("all", record["family"]):
            for language in ("all", record["language"]):
                groups.setdefault((family, language), []).append(record)
    return [
        {"family": family, "language": language, "problems": len(members), **_measures(members, seed)}
        for (family, language), members in sorted(groups.items(), key=lambda item: _all_first(item[0]))
    ]


def _measures(members: Sequence[dict[str, Any]], seed: int) -> dict[str, float]:
    figures = {}
    contents = [member["content"] for member in members]
    for measure in MEASURES:
        interval = bootstrap_mean if measure == "length" else bootstrap_share
        figures |= _named(measure, interval([member[measure] for member in members], contents, seed=seed))
    return figures


def _named(measure: str, interval: Interval) -> dict[str, float]:
    return {measure: interval.mean, f"{measure}_low": interval.low, f"{measure}_high": interval.high}


def _all_first(key: tuple[str, str]) -> tuple[tuple[bool, str], ...]:
    return tuple((name != "all", name) for name in key)
