"""Preferences from rollouts: of replies to the same problem, a better one against a worse one.

What made the replies scored them already: an exact verifier's verdict (`accuracy`), or the whole reward, which replies
to general prompts have too. The best reply of a group goes against its worst, the second best against the second worst,
and so on while they are far enough apart.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from infra.config import Config, Field
from infra.errors import InputError
from infra.stage import Context, Inputs, one_of, stage
from stages.corpus.document import fraction
from stages.problems.problem import Problem
from stages.rl.preferences import Preference, write_preferences
from stages.rl.rollout import read_rollouts

COLUMNS = ("step", "problem_id", "language", "problem", "prompt", "completion", "finished", "reward", "accuracy")
Row = Mapping[str, Any]


class MakePreferencesConfig(Config):
    judge: Literal["accuracy", "reward"] = Field(
        "accuracy", title="Judge", description="accuracy: a right reply against a wrong one; reward: a higher reward"
    )
    min_margin: float = Field(0.5, title="Least margin", description="Between the two, in the judge's units.", gt=0)
    pairs_per_problem: int = Field(4, title="Pairs a problem", description="At most, over all its groups.", ge=1)
    balance_languages: bool = Field(
        True, title="Balance languages", description="As many pairs of each language as of the rarest."
    )
    max_pairs: int | None = Field(None, title="At most", description="Pairs in all.", ge=1)
    seed: int = Field(0, title="Seed", description="Decides between equal replies and which pairs stay.")


@stage(version=2, takes={"rollouts": one_of("rollouts", "checkpoint")}, makes="preferences")
def make_preferences(config: MakePreferencesConfig, inputs: Inputs, ctx: Context) -> dict:
    """Pair better with worse replies of rollouts, such as a grpo checkpoint keeps."""
    rows = list(read_rollouts(inputs["rollouts"].path, COLUMNS))
    pairs = choose(pair_up(rows, config, inputs["rollouts"].id), config)
    if not pairs:
        raise InputError(
            f"{inputs['rollouts'].id}: of {len(rows)} replies no two to one problem differ by {config.min_margin} in "
            f"{config.judge}: lower min_margin, sample more replies a problem, or judge general prompts by reward"
        )
    counts = Counter(f"language_{pair.language}" for pair in pairs)
    return {
        "pairs": write_preferences(ctx.out, pairs),
        "prompts": len({pair.prompt for pair in pairs}),
        "replies": len(rows),
        "problems": len({row["problem_id"] for row in rows}),
        "mean_margin": round(sum(pair.margin or 0.0 for pair in pairs) / len(pairs), 4),
        **dict(sorted(counts.items())),
    }


def pair_up(rows: Iterable[Row], config: MakePreferencesConfig, source: str) -> list[Preference]:
    """At most `pairs_per_problem` pairs of every problem, the widest margins first.

    A reply that was cut off has no end to be judged at, so it is in no pair. Replies of different steps come from
    different policies and are not compared.
    """
    groups: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row["finished"] and row[config.judge] is not None:  # an open problem has no accuracy
            groups[row["problem_id"], row["step"]].append(row)
    problems: dict[str, dict[tuple[str, str], Preference]] = defaultdict(dict)
    for (problem, step), group in sorted(groups.items()):
        found = problems[problem]
        distinct = {row["completion"]: row for row in group}.values()

        def worth(row: Row, of: str = f"{problem} {step} {config.seed}") -> tuple[float, float]:
            return row[config.judge], fraction(row["completion"], of)

        ranked = sorted(distinct, key=worth)
        for worse, better in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
            margin = round(better[config.judge] - worse[config.judge], 9)  # 0.7 − 0.2 is 0.5
            if margin >= config.min_margin:
                texts = better["completion"], worse["completion"]
                prompt = json.dumps([{"role": "user", "content": better["prompt"]}], ensure_ascii=False)
                content = Problem.from_json(better["problem"]).content
                id = f"{problem}/{len(found)}"
                found.setdefault(texts, Preference(id, prompt, *texts, better["language"], source, margin, content))
    kept = []
    for pairs in problems.values():
        widest = sorted(pairs.values(), key=lambda pair: -(pair.margin or 0.0))
        kept += widest[: config.pairs_per_problem]
    return kept


def choose(pairs: list[Preference], config: MakePreferencesConfig) -> list[Preference]:
    """An even draw of the pairs: as many of each language if they are balanced, and at most `max_pairs`."""
    drawn = sorted(pairs, key=lambda pair: fraction(pair.id, f"pair {config.seed}"))
    if config.balance_languages and drawn:
        fewest = min(Counter(pair.language for pair in drawn).values())
        seen: Counter[str] = Counter()
        balanced = []
        for pair in drawn:
            seen[pair.language] += 1
            if seen[pair.language] <= fewest:
                balanced.append(pair)
        drawn = balanced
    return drawn[: config.max_pairs]
