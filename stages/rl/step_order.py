"""Whether a process reward model can tell two replies to one problem apart.

Accuracy over all steps does not say it: a model that only knows which problems are hard is right for most of them, and
in a group of replies, where rewards are compared, it knows nothing (benchmarks/LOG.md, 2026-11-26).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean

from infra.metrics import Report
from stages.evaluation.intervals import Interval, bootstrap_share
from stages.rl.preference_tasks import Chain
from stages.rl.reward_model import load_reward_model
from stages.training.distributed import process_group


@dataclasses.dataclass(frozen=True)
class OrderJob:
    """`replies` are those to each question, by (content of its problem, question)."""

    folder: str  # of the process reward model
    replies: Mapping[tuple[str, str], Sequence[Chain]]


def order_replies(job: OrderJob, report: Report) -> list[tuple[str, float]]:
    """For this rank's share of the questions: (content, 1 if the reply with the better labels has the better scores, ½
    for a tie, else 0) of each pair of replies whose mean labels differ."""
    found: list[tuple[str, float]] = []
    with process_group() as ranks:
        judge = load_reward_model(job.folder, str(ranks.device))
        questions = sorted(job.replies)
        for number in range(ranks.rank, len(questions), ranks.world):
            chains = job.replies[questions[number]]
            scored = judge.likely([(chain.ids, chain.places) for chain in chains])
            means = [(fmean(chain.labels), fmean(scores)) for chain, scores in zip(chains, scored, strict=True)]
            for (label, score), (other_label, other_score) in itertools.combinations(means, 2):
                if label != other_label:
                    better = (score - other_score) * (label - other_label)
                    found.append((questions[number][0], 0.5 if better == 0 else float(better > 0)))
            report(min(number + ranks.world, len(questions)), len(questions), "questions")
    return found


def share_in_order(pairs: Sequence[tuple[str, float]], seed: int) -> Interval | None:
    """Their mean with its interval over problems; None of no pairs. A model that is blind to replies is at ½."""
    if not pairs:
        return None
    contents, right = zip(*pairs, strict=True)
    return bootstrap_share(right, contents, seed)
